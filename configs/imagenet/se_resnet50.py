# Table 1, row "ResNet50", SE.
_base_ = './resnet50.py'

model = dict(backbone=dict(type='SEResNet'))
