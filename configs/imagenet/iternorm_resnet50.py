# Table 3, ResNet50 with IterNorm in place of every batch norm.
_base_ = './resnet50.py'

model = dict(backbone=dict(norm_cfg=dict(type='IterNorm')))
