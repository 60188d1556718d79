# Table 5, row "ResNet101": the deeper baseline.
_base_ = './mask_rcnn_r50.py'

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='{{$RESNET101_CHECKPOINT:torchvision://resnet101}}')))
