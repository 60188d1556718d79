"""CE in networks of MMDetection, mmpretrain and MMSegmentation: training and a round trip in each.

The configs are written as users write them, a base and a line or two for CE; options like those
of `--cfg-options` then make them small.
"""
# isort: off
import cenet_mmdet.models.mmpretrain  # noqa: F401 - before mmpretrain, which asks for torchvision
# isort: on
import copy
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, Dict, NamedTuple

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint

from cenet_mmdet import CE

STEPS = 2
COMMON = '''
custom_imports = dict(imports=['cenet_mmdet'])
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
'''
DETECTION = '''
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(
        data_root='{shapes}/', indices=4,
        metainfo=dict(classes=('disk', 'square', 'triangle', 'star', 'cross')), pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask='cascade' in '{base}'),
            dict(type='Resize', scale=(96, 96)),
            dict(type='PackDetInputs')]))
train_cfg = dict(max_epochs=1)
'''
CLASSIFICATION = '''
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='CustomDataset', data_root='{pictures}/images',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
train_cfg = dict(max_epochs=1)
'''
SEGMENTATION = '''
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='BaseSegDataset', data_root='{pictures}', img_suffix='.png',
    metainfo=dict(classes=('right', 'left'), palette=[(0, 0, 0), (255, 255, 255)]),
    data_prefix=dict(img_path='images/one', seg_map_path='labels/one'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='PackSegInputs')]))
train_cfg = dict(max_iters=2)
'''


class Neighbour(NamedTuple):
    """A config of another library with CE in it."""
    base: str  # its path in the library's configs
    lines: str  # what the user adds
    options: Dict[str, Any]  # what makes it small
    learning: int  # number of CE layers that learn
    frozen: int = 0  # number of CE layers in stages that the config freezes
    data: str = DETECTION  # lines for data of the library's kind
    result: str = 'pred_instances.scores'  # the tensor in a prediction


def below(prefix, **options):
    return {f'model.{prefix}.{key}': value for key, value in options.items()}


SMALL_RESNET = below('backbone', init_cfg=None, base_channels=16)
SMALL_FPN = below('neck', in_channels=[64, 128, 256, 512], out_channels=32)
SMALL_HEAD = {**below('bbox_head', in_channels=32, feat_channels=32, stacked_convs=1),
              **below('test_cfg', score_thr=0.0, nms_pre=10, max_per_img=10)}
SMALL_CASCADE = {
    **below('rpn_head', in_channels=32, feat_channels=32),
    **below('roi_head.bbox_roi_extractor', out_channels=32),
    **below('roi_head.mask_roi_extractor', out_channels=32),
    **below('roi_head.mask_head', in_channels=32, conv_out_channels=32),
    'model.train_cfg.rpn_proposal.max_per_img': 20, 'model.test_cfg.rpn.max_per_img': 5,
    **below('test_cfg.rcnn', score_thr=0.0, max_per_img=5)}
for i in range(3):
    SMALL_CASCADE.update({**below(f'roi_head.bbox_head.{i}', in_channels=32, fc_out_channels=32),
                          **below(f'train_cfg.rcnn.{i}.sampler', num=8)})
SMALL_TRANSFORMER = {
    'model.num_queries': 10, 'model.test_cfg.max_per_img': 10,
    **{f'model.{part}.{key}': value for part in ('encoder', 'decoder') for key, value in (
        ('num_layers', 1), ('layer_cfg.ffn_cfg.feedforward_channels', 64))}}
SLOW = {'optim_wrapper.optimizer.lr': 1e-3}  # theirs are for larger batches
SLIM = below('backbone', base_channels=16, stem_channels=16)
SMALL_HEADS = {'model.pretrained': None, 'model.data_preprocessor.size': (64, 64),
               **below('decode_head', channels=16, num_classes=2),
               **below('auxiliary_head', channels=16, num_classes=2, in_channels=256)}

PLUGINS = ("zero_init_residual=False, plugins=[dict(cfg=dict(type='CE'), "
           "stages=(True, True, True, False), position='after_conv3')]")
RESNET = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
SEGMENTERS = Path(find_spec('mmseg').origin).parent if find_spec('mmseg') else Path('mmseg')


def detector(base, backbone, options, *counts):
    return Neighbour(f'mmdet::{base}', f'model = dict(backbone=dict({backbone}))',
                     {**SMALL_RESNET, **options}, *counts)


def classifier(backbone, count):
    # MMDetection's ResNet keeps norms in evaluation unless told not to, mmpretrain's does not
    return Neighbour(RESNET, f'model = dict(backbone=dict({backbone}))',
                     {**SLIM, 'model.head.in_channels': 512, **SLOW}, count, 0, CLASSIFICATION,
                     'pred_score')


def segmenter(base, backbone, norm, in_channels, count):
    # by its path: MMEngine knows `mmseg::` of the distribution named mmsegmentation only
    head = f"dict(norm_cfg=dict(_delete_=True, type='{norm}'))"
    return Neighbour(
        str(SEGMENTERS / f'.mim/configs/{base}_4xb2-40k_cityscapes-512x1024.py'),
        f'model = dict(backbone=dict({backbone}), decode_head={head}, auxiliary_head={head})',
        {**SLIM, **SMALL_HEADS, 'model.decode_head.in_channels': in_channels}, count, 0,
        SEGMENTATION, 'seg_logits.data')


NEIGHBOURS = {
    'cascade': detector('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', "type='CEResNet'",
                        {**SMALL_FPN, **SMALL_CASCADE}, 10, 4),
    'retinanet': detector('retinanet/retinanet_r50_fpn_1x_coco.py', PLUGINS,
                          {**SMALL_FPN, **SMALL_HEAD}, 10, 3),
    # in the head too, whose CE layers see the five levels of the pyramid one after the other
    'fcos': detector(
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        "type='CEResNet'), bbox_head=dict(norm_cfg=dict(type='CEGN', num_groups=8)",
        {**SMALL_FPN, **SMALL_HEAD}, 12, 4),
    'detr': detector('detr/detr_r50_8xb2-150e_coco.py', PLUGINS,
                     {'model.neck.in_channels': [512], **SMALL_TRANSFORMER}, 10, 3),
    'deformable-detr': detector(
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        "type='CEResNet', ce_cfg=dict(type='SyncCE')",
        {'model.neck.in_channels': [128, 256, 512], **SMALL_TRANSFORMER}, 10, 4),
    # behind all norms of the backbone; SyncBN has no place on a CPU
    'rtmdet': Neighbour(
        'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', '''
model = dict(
    backbone=dict(init_cfg=None, norm_cfg=dict(_delete_=True, type='CEBN')),
    neck=dict(norm_cfg=dict(type='BN')), bbox_head=dict(norm_cfg=dict(type='BN')))
''', {'model.backbone.widen_factor': 0.125,
      **below('neck', in_channels=[32, 64, 128], out_channels=32),
      **below('bbox_head', in_channels=32, feat_channels=32),
      **below('test_cfg', score_thr=0.0, nms_pre=10, min_bbox_size=-1)}, 33),
    'mmpretrain-CEResNet': classifier("type='CEResNet', norm_eval=False", 14),
    'mmpretrain-plugins': classifier(f"type='mmdet.ResNet', norm_eval=False, {PLUGINS}", 13),
    'mmpretrain-CEBN': classifier("norm_cfg=dict(type='CEBN'), zero_init_residual=False", 53),
    # replaced as a whole: MMDetection's ResNet knows no `contract_dilation`
    'mmseg-fcn': segmenter(
        'fcn/fcn_r50-d8', "_delete_=True, type='CEResNet', depth=50, deep_stem=True, "
        'norm_eval=False, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)', 'BN', 512, 14),
    'mmseg-pspnet': segmenter('pspnet/pspnet_r50-d8', f"norm_cfg=dict(type='BN'), {PLUGINS}", 'BN',
                              512, 13),
    # in the heads too, one of which normalizes maps of a single pixel
    'mmseg-upernet': segmenter(
        'upernet/upernet_r50', "norm_cfg=dict(type='CEBN'), zero_init_residual=False", 'CEBN',
        [64, 128, 256, 512], 68),
}


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """Two pictures of each of two classes; with label maps, whose left half is class 1."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    labels = np.repeat(np.uint8([[1, 0]]), 32, 1).repeat(64, 0)
    for name in ('one/0.png', 'one/1.png', 'two/0.png', 'two/1.png'):
        mmcv.imwrite(rng.integers(0, 256, (64, 64, 3), np.uint8), str(folder / 'images' / name))
        mmcv.imwrite(labels, str(folder / 'labels' / name))
    return folder


@pytest.mark.parametrize('name', NEIGHBOURS)
def test_steps_and_round_trip(name, shapes, pictures, plain_configs, tmp_path):
    """CE learns where its stage is not frozen; the checkpoint gives the same network."""
    if name.startswith('mmseg'):
        pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    neighbour = NEIGHBOURS[name]
    lines = neighbour.data.format(shapes=shapes, pictures=pictures, base=neighbour.base)
    (tmp_path / 'mine.py').write_text(
        f'_base_ = {neighbour.base!r}\n{neighbour.lines}{COMMON}{lines}')
    cfg = Config.fromfile(tmp_path / 'mine.py')
    cfg.merge_from_dict({**neighbour.options, 'work_dir': str(tmp_path), 'randomness.seed': 0})
    runner = Runner.from_cfg(cfg)
    runner.train()
    check_participation(runner.model, neighbour)

    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))  # as the runner does
    averaged = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    trained, reloaded = (averaged or [runner.model])[0].eval(), MODELS.build(cfg.model).eval()
    load_checkpoint(reloaded, (tmp_path / 'last_checkpoint').read_text(), strict=True)
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in reloaded.state_dict().items())
    batch = next(iter(runner.train_dataloader))
    with torch.no_grad():
        ours, theirs = (list(map(attrgetter(neighbour.result), model.test_step(batch)))
                        for model, batch in ((reloaded, copy.deepcopy(batch)), (trained, batch)))
    assert len(ours[0]) and torch.isfinite(ours[0]).all()
    assert all(map(torch.equal, ours, theirs))


def check_participation(model, neighbour):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CE)}
    learning = {name for name, ce in layers.items() if ce.lambda_logit.requires_grad}
    assert (len(learning), len(layers) - len(learning)) == (neighbour.learning, neighbour.frozen)
    for name, ce in layers.items():
        levels = 5 if name.startswith('bbox_head') else 1
        batches = STEPS * levels if name in learning else 0
        assert ce.num_batches_tracked == batches, name
        assert bool(ce.lambda_logit != 0) is (name in learning), name
