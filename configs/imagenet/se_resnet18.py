# Table 1, row "ResNet18", SE: mmpretrain has no such network; these are its SE layers
# at the places where CE has its own.
_base_ = './ce_resnet18.py'

model = dict(backbone=dict(ce_cfg=dict(type='SELayer'), ce_stem=False))
