# mask_rcnn_r101.py for 12 epochs instead of 24.
_base_ = './mask_rcnn_r101.py'

train_cfg = dict(max_epochs=12)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=12, milestones=[8, 11])
