# Table 2, "ShuffleNetv2 0.5x", SE.
_base_ = './se_shufflenet_v2_x1_0.py'

model = dict(backbone=dict(widen_factor=0.5))
