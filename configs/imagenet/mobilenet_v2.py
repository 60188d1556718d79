# Table 2, "MobileNetv2 1x": the baseline.
_base_ = '../_base_/imagenet.py'

model = dict(
    backbone=dict(type='MobileNetV2'),
    head=dict(in_channels=1280))
