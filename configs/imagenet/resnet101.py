# Table 1, row "ResNet101": the baseline.
_base_ = './resnet50.py'

model = dict(backbone=dict(depth=101))
