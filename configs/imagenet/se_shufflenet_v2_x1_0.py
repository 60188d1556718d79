# Table 2, "ShuffleNetv2 1x", SE: its layers at the places where CE has its own.
_base_ = './ce_shufflenet_v2_x1_0.py'

model = dict(backbone=dict(ce_cfg=dict(type='SELayer')))
