# Table 1, row "ResNet101", SE.
_base_ = './resnet101.py'

model = dict(backbone=dict(type='SEResNet'))
