"""CE inside detectors of MMDetection's zoo: training steps and a checkpoint round trip in each.

The configs are written as users write them, a base and a line or two for CE; options like
those of `--cfg-options` then make them small.
"""
from typing import Dict, NamedTuple

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmdet.apis import inference_detector, init_detector
from mmdet.models.backbones import ResNet
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from cenet_mmdet import CE

STEPS = 2

DATA = '''
custom_imports = dict(imports=['cenet_mmdet'])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={with_mask}),
    dict(type='Resize', scale=(96, 96)),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96)),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='{data}/', pipeline=train_pipeline, indices=4,
                 metainfo=dict(classes=('disk', 'square', 'triangle', 'star', 'cross'))))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
train_cfg = dict(max_epochs=1)
val_dataloader = val_evaluator = val_cfg = None
'''


class Neighbour(NamedTuple):
    """A config of the zoo with CE in it.

    Attributes:
        base: its path in MMDetection.
        lines: what the user adds.
        options: what makes it small.
        learning: number of CE layers that learn.
        frozen: number of CE layers in stages that the config freezes.
    """
    base: str
    lines: str
    options: Dict
    learning: int
    frozen: int


SMALL_RESNET = {'model.backbone.init_cfg': None, 'model.backbone.base_channels': 16}
SMALL_FPN = {'model.neck.in_channels': [64, 128, 256, 512], 'model.neck.out_channels': 32}
SMALL_HEAD = {'model.bbox_head.in_channels': 32, 'model.bbox_head.feat_channels': 32,
              'model.bbox_head.stacked_convs': 1, 'model.test_cfg.score_thr': 0.0,
              'model.test_cfg.nms_pre': 10, 'model.test_cfg.max_per_img': 10}
SMALL_CASCADE = {
    'model.rpn_head.in_channels': 32, 'model.rpn_head.feat_channels': 32,
    'model.roi_head.bbox_roi_extractor.out_channels': 32,
    'model.roi_head.mask_roi_extractor.out_channels': 32,
    'model.roi_head.mask_head.in_channels': 32, 'model.roi_head.mask_head.conv_out_channels': 32,
    **{f'model.roi_head.bbox_head.{stage}.{key}': value for stage in range(3)
       for key, value in (('in_channels', 32), ('fc_out_channels', 32))},
    **{f'model.train_cfg.rcnn.{stage}.sampler.num': 8 for stage in range(3)},
    'model.train_cfg.rpn_proposal.max_per_img': 20, 'model.test_cfg.rpn.max_per_img': 5,
    'model.test_cfg.rcnn.score_thr': 0.0, 'model.test_cfg.rcnn.max_per_img': 5}
SMALL_TRANSFORMER = {
    'model.encoder.num_layers': 1, 'model.decoder.num_layers': 1, 'model.num_queries': 10,
    'model.encoder.layer_cfg.ffn_cfg.feedforward_channels': 64,
    'model.decoder.layer_cfg.ffn_cfg.feedforward_channels': 64, 'model.test_cfg.max_per_img': 10}

PLUGIN = '''
model = dict(backbone=dict(zero_init_residual=False, plugins=[
    dict(cfg=dict(type='CE'), stages=(True, True, True, False), position='after_conv3')]))
'''

NEIGHBOURS = {
    'cascade': Neighbour(
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        "model = dict(backbone=dict(type='CEResNet'))",
        {**SMALL_RESNET, **SMALL_FPN, **SMALL_CASCADE}, learning=10, frozen=4),
    'retinanet': Neighbour(
        'retinanet/retinanet_r50_fpn_1x_coco.py', PLUGIN,
        {**SMALL_RESNET, **SMALL_FPN, **SMALL_HEAD}, learning=10, frozen=3),
    # in the head too, whose CE layers see the five levels of the pyramid one after the other
    'fcos': Neighbour(
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', '''
model = dict(
    backbone=dict(type='CEResNet'),
    bbox_head=dict(norm_cfg=dict(type='CEGN', num_groups=8)))
''', {**SMALL_RESNET, **SMALL_FPN, **SMALL_HEAD}, learning=12, frozen=4),
    'detr': Neighbour(
        'detr/detr_r50_8xb2-150e_coco.py', PLUGIN,
        {**SMALL_RESNET, 'model.neck.in_channels': [512], **SMALL_TRANSFORMER},
        learning=10, frozen=3),
    'deformable-detr': Neighbour(
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        "model = dict(backbone=dict(type='CEResNet', ce_cfg=dict(type='SyncCE')))",
        {**SMALL_RESNET, 'model.neck.in_channels': [128, 256, 512], **SMALL_TRANSFORMER},
        learning=10, frozen=4),
    # behind all norms of the backbone; SyncBN has no place on a CPU
    'rtmdet': Neighbour(
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py', '''
model = dict(
    backbone=dict(init_cfg=None, norm_cfg=dict(_delete_=True, type='CEBN')),
    neck=dict(norm_cfg=dict(type='BN')), bbox_head=dict(norm_cfg=dict(type='BN')))
''', {'model.backbone.widen_factor': 0.125, 'model.neck.in_channels': [32, 64, 128],
      'model.neck.out_channels': 32, 'model.bbox_head.in_channels': 32,
      'model.bbox_head.feat_channels': 32, 'model.test_cfg.score_thr': 0.0,
      'model.test_cfg.nms_pre': 10, 'model.test_cfg.min_bbox_size': -1}, learning=33, frozen=0),
}


@pytest.fixture(autouse=True)
def plain_logs(monkeypatch):
    """MMEngine lays out the config for its log, which takes longer than the training steps."""
    for place in ('yapf.yapflib.yapf_api.FormatCode', 'mmengine.config.config.FormatCode'):
        monkeypatch.setattr(place, lambda text, **_: (text, True), raising=False)


@pytest.mark.parametrize('name', NEIGHBOURS)
def test_steps_and_round_trip(name, shapes, tmp_path):
    """CE learns where its stage is not frozen; the checkpoint gives the same detector."""
    neighbour = NEIGHBOURS[name]
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = 'mmdet::{neighbour.base}'\n{neighbour.lines}"
                      + DATA.format(data=shapes, with_mask='mask' in neighbour.base))
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({**neighbour.options, 'work_dir': str(tmp_path), 'randomness.seed': 0})
    runner = Runner.from_cfg(cfg)
    runner.train()
    check_participation(runner.model, neighbour)

    trained = saved_model(runner)
    reloaded = init_detector(cfg, str(tmp_path / 'epoch_1.pth'), device='cpu')
    expected = trained.state_dict()
    assert list(reloaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in reloaded.state_dict().items())

    trained.cfg = cfg
    image = str(next((shapes / 'val2017').iterdir()))
    ours, theirs = (inference_detector(model.eval(), image).pred_instances
                    for model in (reloaded, trained))
    assert len(ours) and torch.isfinite(ours.scores).all()
    for key, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def check_participation(model, neighbour):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CE)}
    learning = {name for name, ce in layers.items() if ce.lambda_logit.requires_grad}
    assert (len(learning), len(layers) - len(learning)) == (neighbour.learning, neighbour.frozen)
    for name, ce in layers.items():
        levels = 5 if name.startswith('bbox_head') else 1
        batches = STEPS * levels if name in learning else 0
        assert ce.num_batches_tracked == batches, name
        assert bool(ce.lambda_logit != 0) is (name in learning), name


def saved_model(runner):
    """What the checkpoint's `state_dict` is of: with EMA, the averaged model."""
    ema = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    return ema[0] if ema else runner.model


@pytest.mark.parametrize('freeze, learns', [
    ('none', {'lambda_logit', '0.weight', '1.weight', '1.bias', '3.weight'}),
    ('adaptive', set()), ('all', set())])
def test_freeze_in_a_norm_cfg(freeze, learns):
    """MMCV lets every parameter of a norm learn once it is built; what CE froze is frozen anew."""
    for use in (lambda norm: norm.to('cpu'), lambda norm: norm.train(), lambda norm: norm.eval(),
                lambda norm: norm.init_weights()):
        _, norm = build_norm_layer(dict(type='CEBN', ce_cfg=dict(freeze=freeze)), 16)
        use(norm)
        assert norm.norm.weight.requires_grad
        assert {name.replace('reweighting.', '') for name, p in norm.ce.named_parameters()
                if p.requires_grad} == learns
    _, norm = build_norm_layer(dict(type='CEBN', requires_grad=False), 16)
    assert not any(p.requires_grad for p in norm.parameters())


def test_zero_init_residual_spares_ce():
    """It sets all weights of what stands in the norm's place to 0, from which IR cannot learn."""
    backbone = ResNet(50, norm_cfg=dict(type='CEBN'), base_channels=16, stem_channels=16)
    backbone.init_weights()
    last = backbone.layer1[0].bn3
    assert not last.norm.weight.any()
    assert all(layer.weight.any() for layer in last.ce.reweighting if hasattr(layer, 'weight'))


def test_initialization_keeps_trained_ce():
    backbone = ResNet(50, norm_cfg=dict(type='CEBN'), base_channels=16, stem_channels=16)
    ce = backbone.bn1.ce
    backbone(torch.randn(2, 3, 32, 32))
    weight = ce.reweighting[0].weight.clone()
    backbone.init_weights()
    assert ce.num_batches_tracked == 1
    assert torch.equal(ce.reweighting[0].weight, weight)
