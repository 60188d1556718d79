# Table 5, row "ResNet50 +CE": batch norm and CE wholly frozen, that is gamma,
# beta, lambda, the IR subnetwork and all running statistics.
_base_ = './mask_rcnn_r50.py'

model = dict(
    backbone=dict(
        type='CEResNet',
        norm_cfg=dict(requires_grad=False),
        ce_cfg=dict(freeze='all'),
        init_cfg=dict(checkpoint='{{$CE_RESNET50_CHECKPOINT:data/ce_resnet50.pth}}')))
