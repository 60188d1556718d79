# Table 1, row "ResNet50", CE.
_base_ = './resnet50.py'

model = dict(backbone=dict(type='CEResNet', out_indices=(3, )))
