"""CE in classifiers of mmpretrain and in segmentation networks of MMSegmentation.

One training step in each, and a checkpoint round trip.
"""
# isort: off
import cenet_mmdet.models.mmpretrain  # noqa: F401 - before mmpretrain, which asks for torchvision
# isort: on
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint

from cenet_mmdet import CE

COMMON = '''
custom_imports = dict(imports=['cenet_mmdet'])
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
'''

PLUGINS = '''plugins=[
    dict(cfg=dict(type='CE'), stages=(True, True, True, False), position='after_conv3')]'''

SLIM = {'model.backbone.base_channels': 16, 'model.backbone.stem_channels': 16}


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of each of two classes; with label maps, whose left half is class 1."""
    rng = np.random.default_rng(0)
    labels = np.zeros((64, 64), np.uint8)
    labels[:, :32] = 1
    for split in ('one', 'two'):
        for index in range(2):
            name = f'{split}/{index}.png'
            mmcv.imwrite(rng.integers(0, 256, (64, 64, 3), np.uint8),
                         str(tmp_path / 'data' / 'images' / name))
            mmcv.imwrite(labels, str(tmp_path / 'data' / 'labels' / name))
    return tmp_path / 'data'


def round_trip(lines, options, tmp_path, layers):
    """Write the user's config, train for a step, and load its checkpoint into a new model."""
    config = tmp_path / 'mine.py'
    config.write_text(lines + COMMON)
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({**options, 'work_dir': str(tmp_path)})
    runner = Runner.from_cfg(cfg)
    runner.train()
    trained = runner.model.eval()
    check_participation(trained, layers)

    reloaded = MODELS.build(cfg.model).eval()
    load_checkpoint(reloaded, str(next(tmp_path.glob('*_1.pth'))), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours, expected = (model(images, mode='tensor') for model in (reloaded, trained))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def check_participation(model, layers):
    ce = {name: m for name, m in model.named_modules() if isinstance(m, CE)}
    assert len(ce) == layers
    for name, layer in ce.items():
        assert layer.num_batches_tracked == 1, name
        assert layer.lambda_logit != 0, name


CLASSIFIER_DATA = '''
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='CustomDataset', data_root='{data}/images',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
train_cfg = dict(max_epochs=1)
'''


@pytest.mark.parametrize('backbone, layers', [
    # MMDetection's ResNet keeps norms in evaluation unless told not to, mmpretrain's does not
    ("type='CEResNet', norm_eval=False", 14),
    (f"type='mmdet.ResNet', norm_eval=False, zero_init_residual=False, {PLUGINS}", 13),
    ("norm_cfg=dict(type='CEBN'), zero_init_residual=False", 53),
], ids=['CEResNet', 'plugins', 'CEBN'])
def test_mmpretrain(backbone, layers, pictures, tmp_path):
    round_trip(f"_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'\n"
               f'model = dict(backbone=dict({backbone}))' + CLASSIFIER_DATA.format(data=pictures),
               {**SLIM, 'model.head.in_channels': 512}, tmp_path, layers)


SEGMENTATION_DATA = '''
crop_size = (64, 64)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='BaseSegDataset', data_root='{data}', img_suffix='.png',
    metainfo=dict(classes=('right', 'left'), palette=[(0, 0, 0), (255, 255, 255)]),
    data_prefix=dict(img_path='images/one', seg_map_path='labels/one'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='PackSegInputs')]))
train_cfg = dict(max_iters=1)
model = dict(
    pretrained=None, data_preprocessor=dict(size=crop_size),
    backbone=dict({backbone}),
    decode_head=dict(norm_cfg=dict(_delete_=True, type='{norm}')),
    auxiliary_head=dict(norm_cfg=dict(_delete_=True, type='{norm}')))
'''


@pytest.mark.parametrize('base, backbone, norm, in_channels, layers', [
    # replaced as a whole: MMDetection's ResNet knows no `contract_dilation`
    ('fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
     "_delete_=True, type='CEResNet', depth=50, deep_stem=True, norm_eval=False, "
     'strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)', 'BN', 512, 14),
    ('pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
     f"norm_cfg=dict(type='BN'), zero_init_residual=False, {PLUGINS}", 'BN', 512, 13),
    # in the heads too, one of which normalizes maps of a single pixel
    ('upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py',
     "norm_cfg=dict(type='CEBN'), zero_init_residual=False", 'CEBN', [64, 128, 256, 512], 68),
], ids=['fcn-CEResNet', 'pspnet-plugins', 'upernet-CEBN'])
def test_mmsegmentation(base, backbone, norm, in_channels, layers, pictures, tmp_path):
    mmseg = pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    # by its path: MMEngine knows `mmseg::` of the distribution named mmsegmentation only
    configs = Path(mmseg.__file__).parent / '.mim' / 'configs'
    heads = {f'model.{head}.{key}': value for head in ('decode_head', 'auxiliary_head')
             for key, value in (('channels', 16), ('num_classes', 2))}
    round_trip(
        f"_base_ = '{configs / base}'" + SEGMENTATION_DATA.format(
            data=pictures, backbone=backbone, norm=norm),
        {**SLIM, **heads, 'model.decode_head.in_channels': in_channels,
         'model.auxiliary_head.in_channels': 256}, tmp_path, layers)
