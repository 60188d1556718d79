# Table 3, ResNet50 with DBN in place of every batch norm.
_base_ = './resnet50.py'

model = dict(backbone=dict(norm_cfg=dict(type='DBN')))
