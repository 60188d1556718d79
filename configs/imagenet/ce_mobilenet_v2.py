# Table 2, "MobileNetv2 1x", CE.
_base_ = './mobilenet_v2.py'

model = dict(backbone=dict(type='CEMobileNetV2', out_indices=(7, )))
