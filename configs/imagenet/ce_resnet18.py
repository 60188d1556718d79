# Table 1, row "ResNet18", CE.
_base_ = './resnet18.py'

model = dict(backbone=dict(type='CEResNet', out_indices=(3, )))
