# Table 3, ResNet18 with IterNorm in place of every batch norm.
_base_ = './resnet18.py'

model = dict(backbone=dict(norm_cfg=dict(type='IterNorm')))
