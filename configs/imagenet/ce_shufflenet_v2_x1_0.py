# Table 2, "ShuffleNetv2 1x", CE.
_base_ = './shufflenet_v2_x1_0.py'

model = dict(backbone=dict(type='CEShuffleNetV2'))
