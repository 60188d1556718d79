"""The CE-ResNet backbone: placement, freezing, loading, ResNet's own options."""
import copy

import pytest
import torch
from conftest import HALF, LEGACY
from helpers.networks import SLIM, images
from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones.resnet import ResNet
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.layers import fused


def slim(depth=18, **options):
    torch.manual_seed(0)
    backbone = CEResNet(depth, **{**SLIM, **options})
    backbone.train()  # MMDetection's norm_eval has an effect from here on; returns None
    return backbone


def names(backbone):
    return [name for name, _ in backbone.ce_layers()]


def train_once(backbone):
    sum(out.square().mean() for out in backbone(images())).backward()


class TestPlacement:

    @pytest.mark.parametrize(('depth', 'per_stage'), [
        (18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 0)), (101, (3, 4, 0, 0)),
        (152, (3, 8, 0, 0))])
    def test_default_blocks(self, depth, per_stage):
        assert sorted(names(slim(depth))) == sorted(
            ['ce1'] + [f'layer{stage + 1}.{block}.ce'
                       for stage, count in enumerate(per_stage) for block in range(count)])

    def test_size_of_the_released_resnet_50(self):
        with torch.device('meta'):
            backbone = CEResNet(50)
        classifier = 2048 * 1000 + 1000
        assert sum(p.numel() for p in backbone.parameters()) + classifier == 29331926
        assert (backbone.ce1.group_size, backbone.layer1[0].ce.group_size) == (64, 16)

    @pytest.mark.parametrize(('depth', 'position', 'order'), [
        (18, 'last', ['conv2', 'bn2', 'ce', 'relu']),
        (18, 'second', ['conv2', 'bn2', 'ce', 'relu']),
        (50, 'second', ['conv2', 'bn2', 'ce', 'relu', 'conv3', 'bn3', 'relu']),
        (50, 'last', ['conv2', 'bn2', 'relu', 'conv3', 'bn3', 'ce', 'relu'])])
    def test_order_of_calls_in_a_block(self, depth, position, order):
        """The last ReLU of a block comes after the residual addition."""
        backbone = slim(depth, ce_position=position, ce_stem=False)
        called = []
        for name, module in backbone.layer1[1].named_children():
            module.register_forward_hook(lambda *_, name=name: called.append(name))
        backbone(images())
        assert called[called.index('conv2'):] == order

    def test_chosen_blocks(self):
        backbone = slim(50, ce_blocks=[(0, 2), (), [5 - 2], ()], ce_stem=False)
        assert names(backbone) == ['layer1.0.ce', 'layer1.2.ce', 'layer3.3.ce']

    def test_stem_ce_follows_the_stem_norm(self):
        backbone = slim(ce_blocks=[()] * 4)
        x = images()
        with torch.no_grad():
            stem = backbone.maxpool(torch.relu(backbone.ce1(backbone.bn1(backbone.conv1(x)))))
            torch.testing.assert_close(backbone(x)[0], backbone.layer1(stem))

    def test_deep_stem(self):
        backbone = slim(50, deep_stem=True, avg_down=True, ce_blocks=[()] * 4)
        assert names(backbone) == ['stem.ce']
        assert [type(m).__name__ for m in backbone.stem][-3:] == ['BatchNorm2d', 'CE', 'ReLU']
        plain = ResNet(50, deep_stem=True, avg_down=True, **SLIM)
        assert set(plain.state_dict()) < set(backbone.state_dict())

    def test_ce_cfg_reaches_every_layer(self):
        layers = dict(slim(ce_cfg=dict(type='CE', group_size=4, bd_ratio=1.0)).ce_layers())
        assert {ce.bd_ratio for ce in layers.values()} == {1.0}
        assert layers['layer1.0.ce'].group_size == 4

    @pytest.mark.parametrize('arguments', [
        dict(depth=20), dict(depth='50'), dict(ce_position='first'), dict(ce_blocks=[(0, )]),
        dict(ce_blocks=[(2, ), (), (), ()]), dict(ce_blocks=[(-1, ), (), (), ()])], ids=str)
    def test_bad_arguments_are_refused_by_name(self, arguments):
        (name, _), = arguments.items()
        with pytest.raises(ValueError, match=name):
            slim(**arguments)

    def test_registered_where_every_library_sees_it(self):
        assert (MODELS.get('CEResNet'), MODELS.get('CE')) == (CEResNet, CE)
        assert MODELS.build(dict(type='CEResNet', depth=18, _scope_='mmdet', **SLIM))


class TestResNetOptions:

    @pytest.mark.parametrize('options', [
        dict(depth=50, style='caffe'),
        dict(depth=18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2, )),
        dict(depth=50, deep_stem=True, avg_down=True),
        dict(depth=50, dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
             stage_with_dcn=(False, True, True, True)),
        dict(depth=50, plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4),
                                     stages=(False, True, False, False),
                                     position='after_conv3')]),
        dict(depth=18, norm_cfg=dict(type='GN', num_groups=4)),
        dict(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    ], ids=str)
    def test_trains_with(self, options):
        backbone = slim(**options)
        train_once(backbone)
        assert all(ce.num_batches_tracked > 0 for _, ce in backbone.ce_layers())
        assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)

    def test_zero_init_residual_zeroes_the_norm_alone(self):
        ours, default = slim(50, zero_init_residual=True), slim(50)
        for backbone in (ours, default):
            backbone.init_weights()
        assert not ours.layer1[0].bn3.weight.any()
        assert ours.layer1[0].ce.reweighting[0].weight.any()
        assert default.layer1[0].bn3.weight.all()

    @pytest.mark.parametrize('kind', ['CE', 'SyncCE'])
    def test_sync_batchnorm_conversions_leave_ce_alone(self, kind):
        backbone = revert_sync_batchnorm(
            nn.SyncBatchNorm.convert_sync_batchnorm(slim(ce_cfg=dict(type=kind))))
        assert {type(ce).__name__ for _, ce in backbone.ce_layers()} == {kind}
        assert len(names(backbone)) == 9
        assert fused.can_fuse(backbone.bn1, backbone.ce1, torch.randn(2, 8, 4, 4))
        train_once(backbone)

    @pytest.mark.parametrize('options', [
        {}, dict(deep_stem=True), dict(ce_cfg=dict(type='SyncCE'), depth=50)], ids=str)
    def test_fuse_conv_bn_leaves_ce_intact(self, options):
        """Convolutions take up the batch norms, CE follows them as before."""
        backbone = slim(**options)
        for _ in range(2):  # statistics that are not the initial ones
            backbone(images())
        backbone.double().eval()
        expected = backbone(images().double())
        layers = dict(backbone.ce_layers())
        folded = fuse_conv_bn(backbone)
        assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
        assert dict(folded.ce_layers()) == layers
        torch.testing.assert_close(folded(images().double()), expected, rtol=1e-10, atol=1e-10)


class TestFreezing:

    def test_frozen_stages_cover_their_ce_and_the_stems(self):
        backbone = slim(50, frozen_stages=2)
        before = {name: ce.running_whitening.clone() for name, ce in backbone.ce_layers()}
        train_once(backbone)
        for name, ce in backbone.ce_layers():
            frozen = name.startswith(('ce1', 'layer1', 'layer2'))
            assert torch.equal(before[name], ce.running_whitening) is frozen
            assert {p.requires_grad for p in ce.parameters()} == {not frozen}

    def test_deep_stem_is_frozen_whole(self):
        backbone = slim(50, frozen_stages=0, deep_stem=True)
        train_once(backbone)
        assert not backbone.stem.ce.num_batches_tracked
        assert not any(p.requires_grad for p in backbone.stem.parameters())

    def test_norm_eval_leaves_ce_statistics_to_ce_cfg(self):
        backbone = slim(norm_eval=True)
        train_once(backbone)
        assert not backbone.bn1.training and backbone.ce1.num_batches_tracked == 1

    def test_start_line(self, log):
        slim(50, frozen_stages=1).init_weights()
        line, = (r.message for r in log.records if 'CE layers in training' in r.message)
        assert 'batch statistics in layer2 (4), layer3 (6), running statistics in' in line
        assert 'layer1 (3)' in line.split('running statistics')[1]


class TestUnsetStatistics:

    @pytest.fixture(scope='class')
    def plain(self, tmp_path_factory):
        """Weights of a ResNet without CE."""
        path = tmp_path_factory.mktemp('plain') / 'resnet.pth'
        torch.save(ResNet(18, **SLIM).state_dict(), path)
        return dict(type='Pretrained', checkpoint=str(path))

    def test_frozen_and_never_set_is_refused(self, plain):
        frozen = dict(ce_cfg=dict(freeze='all'))
        backbone = slim(**frozen)
        for mode in (True, False):
            with pytest.raises(RuntimeError, match=r"freeze='all'.*layer1\.0\.ce.*allow_unset"):
                backbone.train(mode)
                backbone(images())
        with pytest.raises(RuntimeError, match='never loaded'):
            slim(**frozen, init_cfg=plain).init_weights()
        assert len(slim(**frozen, allow_unset=True)(images())) == 4

    def test_frozen_stage_on_initial_statistics_is_warned_of_once(self, log, plain):
        backbone = slim(frozen_stages=1, init_cfg=plain)
        backbone.init_weights()
        for _ in range(2):
            backbone(images())
        warning, = (r.message for r in log.records if 'initial statistics' in r.message)
        assert 'layer1.0.ce' in warning
        assert 'layer2' not in warning


def test_batch_norm_and_ce_are_computed_in_one(monkeypatch):
    """In CEResNet everywhere, by insert_ce behind batch norms."""
    calls = []
    original = fused.fused_batch_norm_ce
    monkeypatch.setattr(fused, 'fused_batch_norm_ce', lambda norm, ce, z: (
        calls.append(ce), original(norm, ce, z))[1])
    slim()(images())
    assert len(calls) == 9
    model = insert_ce(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8)), '.*')
    model(torch.randn(2, 8, 4, 4))
    assert calls[9:] == [model[0].ce]


@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_gradients_under_autocast(dtype):
    """CE layers see half precision; gradients point where float32's do, statistics agree."""
    backbone = slim(base_channels=16, stem_channels=16)
    x = images(4, 96, 96)
    seen = set()
    for _, ce in backbone.ce_layers():
        ce.register_forward_hook(lambda m, inputs, out: seen.add((inputs[0].dtype, out.dtype)))

    def gradients():
        for _, ce in backbone.ce_layers():
            ce.reset_running_stats()
        backbone.zero_grad()
        sum(feature.float().square().mean() for feature in backbone(x)).backward()
        return (torch.cat([p.grad.flatten() for p in backbone.parameters()]),
                torch.cat([ce.running_whitening.flatten() for _, ce in backbone.ce_layers()]))

    expected, whitening = gradients()
    seen.clear()
    with torch.autocast('cpu', dtype):
        ours, ours_whitening = gradients()
    assert seen == {(dtype, dtype)}
    assert torch.isfinite(ours).all()
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.99
    torch.testing.assert_close(ours_whitening, whitening, rtol=0, atol=0.02)


@pytest.mark.skipif(LEGACY, reason="torch 2.1's tracer fails on properties that make new objects, "
                                   'which CEResNet has; its CE layers compile there')
@pytest.mark.parametrize('training', [
    pytest.param(True, marks=pytest.mark.long), False], ids=['train', 'eval'])
def test_torch_compile_without_graph_breaks(training):
    """Stem, stages with and without a downsample, CE; tracing needs no compiler."""
    plain = slim(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
    plain.train(training)
    compiled = torch.compile(copy.deepcopy(plain), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(images()), plain(images()), rtol=1e-4, atol=1e-4)
