# Table 1, row "ResNet101", CE.
_base_ = './resnet101.py'

model = dict(backbone=dict(type='CEResNet', out_indices=(3, )))
