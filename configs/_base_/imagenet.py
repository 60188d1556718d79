# ImageNet as the released code trains it: 8 GPUs with 32 images each and statistics of
# their own, SGD with weight decay on every parameter, 100 epochs of which the first five
# warm up, label smoothing, PCA lighting. IMAGENET_ROOT holds train/ and val/, one folder
# per class in each.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['cenet_mmdet.models.mmpretrain'])
custom_hooks = [dict(type='ExactResumeHook')]

data_root = '{{$IMAGENET_ROOT:data/imagenet}}'

train_pipeline = [
    # in float32, for Lighting does not clip: 256 would become 0
    dict(type='LoadImageFromFile', to_float32=True),
    dict(type='RandomResizedCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='Lighting',
        eigval=[55.4625, 4.7940, 1.1475],
        # a row for each channel of the images, which are BGR here
        eigvec=[[-0.5836, -0.6948, 0.4203],
                [-0.5808, -0.0045, -0.8140],
                [-0.5675, 0.7192, 0.4009]],
        alphastd=0.1),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=5, convert_to_iter_based=True),
    dict(type='MultiStepLR', milestones=[30, 60, 90], gamma=0.1),
]

auto_scale_lr = dict(enable=False)  # until --auto-scale-lr asks for it

model = dict(
    type='ImageClassifier',
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        topk=(1, 5)))
