# Table 5, row "ResNet50 +SyncCE": batch norm and CE take their statistics over
# all GPUs, gamma and beta learn, lambda and the IR subnetwork are frozen.
_base_ = './mask_rcnn_ce_r50.py'

model = dict(
    backbone=dict(
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False,
        ce_cfg=dict(type='SyncCE', freeze='adaptive')))
