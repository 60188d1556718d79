# Table 2, "MobileNetv2 1x", SE: its layers at the places where CE has its own.
_base_ = './ce_mobilenet_v2.py'

model = dict(backbone=dict(ce_cfg=dict(type='SELayer')))
