# Section 5.3, "CE2-ResNet50": CE after the second norm of each block.
_base_ = './ce_resnet50.py'

model = dict(backbone=dict(ce_position='second'))
