# Table 4, lambda = 0: instance reweighting alone.
_base_ = './ce_resnet50.py'

model = dict(backbone=dict(ce_cfg=dict(bd_ratio=0.0)))
