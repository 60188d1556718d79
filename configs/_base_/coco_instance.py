# COCO 2017 below COCO_ROOT, in COCO's own layout. train2017 is the union of the
# paper's 80k + 35k images, val2017 its mini-val.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

data_root = '{{$COCO_ROOT:data/coco}}/'
val_annotations = data_root + 'annotations/instances_val2017.json'

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=val_annotations)
test_evaluator = dict(ann_file=val_annotations)
