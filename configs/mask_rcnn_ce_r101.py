# Table 5, row "ResNet101 +CE": frozen as in mask_rcnn_ce_r50.py; CE in the
# stem and in the first seven residual blocks.
_base_ = './mask_rcnn_ce_r50.py'

model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='{{$CE_RESNET101_CHECKPOINT:data/ce_resnet101.pth}}')))
