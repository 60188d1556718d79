# Pretraining for mask_rcnn_ce_r18_shapes.py: its backbone as a classifier of single shapes,
# cut out by tools/dev/crop_objects.py. IMAGENET_ROOT points at them.
_base_ = '../_base_/imagenet.py'

metainfo = dict(classes=('cross', 'disk', 'square', 'star', 'triangle'))  # in folder order
image_size = 64
max_epochs = 10

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=image_size, crop_ratio_range=(0.5, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=image_size),
    dict(type='PackInputs'),
]

data_preprocessor = dict(num_classes=5)
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(metainfo=metainfo, pipeline=test_pipeline))
val_evaluator = dict(topk=(1, ))
test_evaluator = dict(topk=(1, ))

model = dict(
    backbone=dict(type='CEResNet', depth=18, base_channels=24, out_indices=(3, )),
    head=dict(num_classes=5, in_channels=192, topk=(1, )))

train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10))  # as the detector
auto_scale_lr = dict(base_batch_size=64)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs))
