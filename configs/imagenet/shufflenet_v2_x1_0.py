# Table 2, "ShuffleNetv2 1x": the baseline.
_base_ = '../_base_/imagenet.py'

model = dict(
    backbone=dict(type='ShuffleNetV2'),
    head=dict(in_channels=1024))
