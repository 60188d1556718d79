# VGG-16 on CIFAR-10 (Figures 1 and 4, section 5.3), the baseline. CIFAR10_ROOT holds
# cifar-10-batches-py/. The paper's recipe is in an appendix that was not at hand; this is
# mmpretrain's for CIFAR-10. Other points of the figures are options, e.g.
#   norm        model.backbone.norm_cfg.type=IN model.backbone.norm_cfg.affine=True
#               model.backbone.norm_cfg.type=GN model.backbone.norm_cfg.num_groups=32
#               (layer norm is group norm with num_groups=1)
#   activation  model.backbone.act_cfg.type=ELU, or LeakyReLU
#   decay       optim_wrapper.optimizer.weight_decay=1e-3
#   labels      train_dataloader.dataset.corrupted=0.4
# Batches that are not the original's, such as images that were JPEGs, need check_md5=False in
# train_dataloader.dataset, val_dataloader.dataset and test_dataloader.dataset.
_base_ = [
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['cenet_mmdet.models.mmpretrain'])
custom_hooks = [dict(type='ExactResumeHook')]

dataset = dict(
    type='CorruptedCIFAR10',
    data_root='{{$CIFAR10_ROOT:data/cifar10}}',
    check_md5=True,
    download=False)

train_dataloader = dict(batch_size=128, dataset=dict(corrupted=0., **dataset))
val_dataloader = dict(batch_size=128, dataset=dataset)
test_dataloader = dict(batch_size=128, dataset=dataset)

auto_scale_lr = dict(enable=False)  # until --auto-scale-lr asks for it

model = dict(
    type='ImageClassifier',
    backbone=dict(type='VGG', depth=16, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss')))
