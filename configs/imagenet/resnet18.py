# Tables 1 and 3, row "ResNet18": the baseline.
_base_ = './resnet50.py'

model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
