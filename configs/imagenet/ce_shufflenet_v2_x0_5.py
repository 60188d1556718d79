# Table 2, "ShuffleNetv2 0.5x", CE.
_base_ = './ce_shufflenet_v2_x1_0.py'

model = dict(backbone=dict(widen_factor=0.5))
