# Table 2, "ShuffleNetv2 0.5x": the baseline.
_base_ = './shufflenet_v2_x1_0.py'

model = dict(backbone=dict(widen_factor=0.5))
