# Table 5, row "ResNet50": the baseline.
_base_ = [
    './_base_/coco_instance.py',
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/schedules/schedule_2x.py',
    './_base_/runtime.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='{{$RESNET50_CHECKPOINT:torchvision://resnet50}}')))
