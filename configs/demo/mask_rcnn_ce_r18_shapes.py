# The demo: a slim CE-ResNet-18 Mask R-CNN that learns five classes of shapes
# from scratch in minutes on a CPU. COCO_ROOT points at the generated set.
_base_ = [
    '../_base_/coco_instance.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/runtime.py',
]

metainfo = dict(
    classes=('disk', 'square', 'triangle', 'star', 'cross'),
    palette=[(66, 135, 245), (242, 182, 39), (224, 70, 70), (112, 193, 72), (170, 90, 220)])
image_size = (160, 160)
max_epochs = 10
# As many samples a bin as the object is large, the default, is what costs most on a CPU.
roi_layer = dict(sampling_ratio=1)

model = dict(
    backbone=dict(
        type='CEResNet',
        depth=18,
        base_channels=24,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=48),
    rpn_head=dict(in_channels=48, feat_channels=48, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48, roi_layer=roi_layer),
        bbox_head=dict(in_channels=48, fc_out_channels=256, num_classes=5),
        mask_roi_extractor=dict(out_channels=48, roi_layer=roi_layer),
        mask_head=dict(in_channels=48, conv_out_channels=48, num_convs=2, num_classes=5)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(metainfo=metainfo, pipeline=test_pipeline))

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min_ratio=0.02,
        by_epoch=True,
        convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_epochs))
custom_hooks = [
    dict(type='ExactResumeHook'),
    dict(type='DataCheckHook'),
    dict(type='ChannelHealthHook', interval=50),
]
