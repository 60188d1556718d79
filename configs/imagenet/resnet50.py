# Tables 1 and 3, row "ResNet50": the baseline.
_base_ = '../_base_/imagenet.py'

model = dict(
    backbone=dict(
        type='ResNet',
        depth=50,
        zero_init_residual=False,
        init_cfg=dict(type='Kaiming', layer='Conv2d')),
    head=dict(in_channels=2048))
