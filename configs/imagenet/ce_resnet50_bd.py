# Table 4, lambda = 1: batch decorrelation alone.
_base_ = './ce_resnet50.py'

model = dict(backbone=dict(ce_cfg=dict(bd_ratio=1.0)))
