# COCO below COCO_ROOT, in COCO's own layout. train2017 is the union of the paper's
# 80k + 35k images, val2017 its mini-val. With COCO_YEAR=2014 the same images are
# taken from the files of 2014, named as they were then.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

data_root = '{{$COCO_ROOT:data/coco}}/'
year = '{{$COCO_YEAR:2017}}'

if year == '2017':
    train_dataset = dict(data_root=data_root)
    val_files = dict(
        ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/'))
elif year == '2014':
    train_part = dict(
        type='CocoDataset',
        data_root=data_root,
        filter_cfg=_base_.train_dataloader.dataset.filter_cfg,
        pipeline=_base_.train_pipeline)
    train_dataset = dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                **train_part,
                ann_file='annotations/instances_train2014.json',
                data_prefix=dict(img='train2014/')),
            dict(
                **train_part,
                ann_file='annotations/instances_valminusminival2014.json',
                data_prefix=dict(img='val2014/')),
        ])
    val_files = dict(
        ann_file='annotations/instances_minival2014.json', data_prefix=dict(img='val2014/'))
else:
    raise ValueError(f'the environment variable COCO_YEAR must be 2017 or 2014, got {year!r}')

train_dataloader = dict(persistent_workers=False, dataset=train_dataset)
val_dataloader = dict(dataset=dict(data_root=data_root, **val_files))
test_dataloader = dict(dataset=dict(data_root=data_root, **val_files))
val_evaluator = dict(ann_file=data_root + val_files['ann_file'])
test_evaluator = dict(ann_file=data_root + val_files['ann_file'])
