# mask_rcnn_ce_r18_shapes.py from the backbone that ce_r18_shapes_classifier.py trained.
_base_ = './mask_rcnn_ce_r18_shapes.py'

checkpoint = '{{$CE_RESNET18_CHECKPOINT:work_dirs/ce_r18_shapes_classifier/epoch_10.pth}}'

model = dict(
    backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=checkpoint)))
