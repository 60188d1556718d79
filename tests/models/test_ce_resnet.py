"""The CE-ResNet backbone: placement, freezing, loading, ResNet's own options."""
import copy
import logging

import pytest
import torch
from conftest import LEGACY
from mmdet.models.backbones.resnet import ResNet
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

from cenet_mmdet import CE, CEResNet
from cenet_mmdet.layers.released_keys import RELEASED_KEYS

# small enough for a test, the structure of the full one
SLIM = dict(base_channels=8, stem_channels=8)


def images(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def names(backbone):
    return [name for name, _ in backbone.ce_layers()]


def train_once(backbone):
    backbone.train()
    sum(out.square().mean() for out in backbone(images())).backward()


@pytest.fixture
def log(caplog):
    """Messages of MMEngine's logger, which does not propagate to pytest's."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


class TestPlacement:

    @pytest.mark.parametrize(('depth', 'per_stage'), [
        (18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 0)), (101, (3, 4, 0, 0)),
        (152, (3, 8, 0, 0))])
    def test_default_blocks(self, depth, per_stage):
        found = names(CEResNet(depth, **SLIM))
        assert sorted(found) == sorted(
            ['ce1'] + [f'layer{stage + 1}.{block}.ce'
                       for stage, count in enumerate(per_stage) for block in range(count)])

    def test_parameters_of_the_released_resnet_50(self):
        """29.3319 million with its classifier, 432 entries with it and without our counters."""
        backbone = CEResNet(50)
        classifier = 2048 * 1000 + 1000
        assert sum(p.numel() for p in backbone.parameters()) + classifier == 29331926
        ours = [k for k in backbone.state_dict() if not k.endswith('ce.num_batches_tracked')
                and k != 'ce1.num_batches_tracked']
        assert len(ours) + 2 == 432
        assert backbone.ce1.group_size == 64
        assert backbone.layer1[0].ce.group_size == 16

    @pytest.mark.parametrize(('depth', 'position', 'order'), [
        (18, 'last', ['conv2', 'bn2', 'ce', 'relu']),
        (18, 'second', ['conv2', 'bn2', 'ce', 'relu']),
        (50, 'second', ['conv2', 'bn2', 'ce', 'relu', 'conv3', 'bn3', 'relu']),
        (50, 'last', ['conv2', 'bn2', 'relu', 'conv3', 'bn3', 'ce', 'relu'])])
    def test_order_of_calls_in_a_block(self, depth, position, order):
        """The last ReLU of a block comes after the residual addition."""
        backbone = CEResNet(depth, ce_position=position, ce_stem=False, **SLIM)
        block = backbone.layer1[1]
        called = []
        for name, module in block.named_children():
            module.register_forward_hook(lambda *_, name=name: called.append(name))
        backbone(images())
        assert called[called.index('conv2'):] == order

    def test_output_is_that_of_the_written_out_block(self):
        torch.manual_seed(0)
        block = CEResNet(50, **SLIM).layer2[1].train()
        x = torch.randn(2, 64, 8, 8)
        out = block.conv1(x)
        out = block.relu(block.bn1(out))
        out = block.relu(block.bn2(block.conv2(out)))
        out = block.ce(block.bn3(block.conv3(out)))
        torch.testing.assert_close(block(x), torch.relu(out + x))

    def test_chosen_blocks(self):
        backbone = CEResNet(50, ce_blocks=[(0, 2), (), [5 - 2], ()], ce_stem=False, **SLIM)
        assert names(backbone) == ['layer1.0.ce', 'layer1.2.ce', 'layer3.3.ce']

    def test_stem_ce_follows_the_stem_norm(self):
        torch.manual_seed(0)
        backbone = CEResNet(18, ce_blocks=[()] * 4, **SLIM)
        x = images()
        with torch.no_grad():
            stem = backbone.maxpool(torch.relu(backbone.ce1(backbone.bn1(backbone.conv1(x)))))
            expected = backbone.layer1(stem)
            torch.testing.assert_close(backbone(x)[0], expected)

    def test_deep_stem(self):
        backbone = CEResNet(50, deep_stem=True, avg_down=True, ce_blocks=[()] * 4, **SLIM)
        assert names(backbone) == ['stem.ce']
        kinds = [type(m).__name__ for m in backbone.stem]
        assert kinds[-3:] == ['BatchNorm2d', 'CE', 'ReLU']
        plain = ResNet(50, deep_stem=True, avg_down=True, **SLIM)
        assert set(plain.state_dict()) < set(backbone.state_dict())

    def test_ce_cfg_reaches_every_layer(self):
        backbone = CEResNet(18, ce_cfg=dict(type='CE', group_size=4, bd_ratio=1.0), **SLIM)
        layers = dict(backbone.ce_layers())
        assert {ce.bd_ratio for ce in layers.values()} == {1.0}
        assert layers['layer1.0.ce'].group_size == 4

    @pytest.mark.parametrize('arguments', [
        dict(depth=20), dict(depth='50'), dict(ce_position='first'), dict(ce_blocks=[(0, )]),
        dict(ce_blocks=[(2, ), (), (), ()]), dict(ce_blocks=[(-1, ), (), (), ()])], ids=str)
    def test_bad_arguments_are_refused_by_name(self, arguments):
        (name, _), = arguments.items()
        with pytest.raises(ValueError, match=name):
            CEResNet(**{'depth': 18, **SLIM, **arguments})


class TestResNetOptions:

    @pytest.mark.parametrize('options', [
        dict(depth=50, style='caffe'),
        dict(depth=50, with_cp=True),
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
        backbone = CEResNet(**options, **SLIM)
        train_once(backbone)
        assert all(ce.num_batches_tracked > 0 for _, ce in backbone.ce_layers())
        assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad
                   and 'out_indices' not in options)

    def test_gradient_checkpointing_changes_no_gradient(self):
        gradients = []
        for with_cp in (False, True):
            torch.manual_seed(0)
            backbone = CEResNet(50, with_cp=with_cp, **SLIM)
            x = images().requires_grad_()
            sum(out.square().mean() for out in backbone(x)).backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)

    def test_zero_init_residual_zeroes_the_norm_alone(self):
        backbone = CEResNet(50, zero_init_residual=True, **SLIM)
        backbone.init_weights()
        block = backbone.layer1[0]
        assert not block.bn3.weight.any()
        assert block.ce.reweighting[0].weight.any()
        default = CEResNet(50, **SLIM)
        default.init_weights()
        assert default.layer1[0].bn3.weight.all()

    def test_plain_resnet_weights_load(self):
        """All of ResNet's keys are found, and only CE's are missing."""
        missing, unexpected = CEResNet(50, **SLIM).load_state_dict(
            ResNet(50, **SLIM).state_dict(), strict=False)
        assert not unexpected
        assert missing
        assert all('ce' in key.split('.') or key.startswith('ce1.') for key in missing)

    def test_sync_batchnorm_conversion_leaves_ce_alone(self):
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(CEResNet(18, **SLIM))
        assert len(names(backbone)) == 9
        backbone = revert_sync_batchnorm(backbone)
        assert len(names(backbone)) == 9
        train_once(backbone)


class TestFreezing:

    def test_frozen_stages_cover_their_ce_and_the_stems(self):
        backbone = CEResNet(50, frozen_stages=2, **SLIM)
        before = {name: ce.running_whitening.clone() for name, ce in backbone.ce_layers()}
        train_once(backbone)
        for name, ce in backbone.ce_layers():
            frozen = name.startswith(('ce1', 'layer1', 'layer2'))
            assert torch.equal(before[name], ce.running_whitening) is frozen
            assert {p.requires_grad for p in ce.parameters()} == {not frozen}

    def test_deep_stem_is_frozen_whole(self):
        backbone = CEResNet(50, frozen_stages=0, deep_stem=True, **SLIM)
        train_once(backbone)
        assert not backbone.stem.ce.num_batches_tracked
        assert not any(p.requires_grad for p in backbone.stem.parameters())

    def test_norm_eval_leaves_ce_statistics_to_ce_cfg(self):
        backbone = CEResNet(18, norm_eval=True, **SLIM)
        train_once(backbone)
        assert not backbone.bn1.training
        assert backbone.ce1.num_batches_tracked == 1

    def test_freeze_all_uses_loaded_statistics_in_training(self):
        learned = CEResNet(18, **SLIM)
        train_once(learned)
        frozen = CEResNet(18, ce_cfg=dict(freeze='all'), **SLIM)
        frozen.load_state_dict(learned.state_dict())
        before = {k: v.clone() for k, v in frozen.state_dict().items() if 'ce' in k}
        train_once(frozen)
        assert all(torch.equal(v, frozen.state_dict()[k]) for k, v in before.items())
        assert not any(p.requires_grad for _, ce in frozen.ce_layers() for p in ce.parameters())


class TestUnsetStatistics:

    def test_frozen_and_never_set_is_refused(self):
        backbone = CEResNet(18, ce_cfg=dict(freeze='all'), **SLIM)
        for mode in (True, False):
            with pytest.raises(RuntimeError, match=r"freeze='all'.*layer1\.0\.ce.*allow_unset"):
                backbone.train(mode)
                backbone(images())

    def test_allow_unset(self):
        backbone = CEResNet(18, ce_cfg=dict(freeze='all'), allow_unset=True, **SLIM)
        assert len(backbone(images())) == 4

    def test_pretrained_checkpoint_without_ce_is_refused_before_training(self, tmp_path):
        path = tmp_path / 'resnet.pth'
        torch.save(ResNet(18, **SLIM).state_dict(), path)
        init_cfg = dict(type='Pretrained', checkpoint=str(path))
        with pytest.raises(RuntimeError, match='never loaded'):
            CEResNet(18, ce_cfg=dict(freeze='all'), init_cfg=init_cfg, **SLIM).init_weights()

    def test_frozen_stage_on_initial_statistics_is_warned_of_once(self, log, tmp_path):
        path = tmp_path / 'resnet.pth'
        torch.save(ResNet(18, **SLIM).state_dict(), path)
        backbone = CEResNet(18, frozen_stages=1,
                            init_cfg=dict(type='Pretrained', checkpoint=str(path)), **SLIM)
        backbone.init_weights()
        backbone.train()
        backbone(images())
        backbone(images())
        warnings = [r.message for r in log.records if 'initial statistics' in r.message]
        assert len(warnings) == 1
        assert 'layer1.0.ce' in warnings[0]
        assert 'layer2' not in warnings[0]


class TestLoading:

    @staticmethod
    def released(backbone):
        """The backbone's state in the authors' format, with a classifier."""
        ours = {v: k for k, v in RELEASED_KEYS.items()}
        state = {'fc.weight': torch.zeros(1000, 64), 'fc.bias': torch.zeros(1000)}
        layers = dict(backbone.ce_layers())
        for key, value in backbone.state_dict().items():
            owner = next((n for n in layers if key.startswith(n + '.')), None)
            name = key[len(owner) + 1:] if owner else None
            if name == 'num_batches_tracked':
                continue
            if name == 'running_mean':
                value = value.reshape(layers[owner].num_groups, -1, 1)
            state[f'{owner}.{ours.get(name, name)}' if owner else key] = value
        return {'epoch': 99, 'state_dict': state, 'best_prec1': 78.2}

    def test_released_checkpoint(self, tmp_path, log):
        torch.manual_seed(1)
        source = CEResNet(50, **SLIM)
        train_once(source)
        path = tmp_path / 'released.pth'
        torch.save(self.released(source), path)
        target = CEResNet(50, ce_cfg=dict(freeze='all'),
                          init_cfg=dict(type='Pretrained', checkpoint=str(path)), **SLIM)
        target.init_weights()
        source.eval()
        target.eval()
        for ours, theirs in zip(target(images()), source(images())):
            torch.testing.assert_close(ours, theirs)
        assert not [r for r in log.records if 'CE entries' in r.message]

    def test_start_line(self, log):
        CEResNet(50, frozen_stages=1, **SLIM).init_weights()
        line, = (r.message for r in log.records if 'CE layers in training' in r.message)
        assert 'batch statistics in layer2 (4), layer3 (6), running statistics in' in line
        assert 'layer1 (3)' in line.split('running statistics')[1]


def test_registered_where_every_library_sees_it():
    assert MODELS.get('CEResNet') is CEResNet
    assert MODELS.get('CE') is CE
    for scope in ('mmdet', ):
        assert MODELS.build(dict(type='CEResNet', depth=18, _scope_=scope, **SLIM))


@pytest.mark.skipif(LEGACY, reason="torch 2.1's tracer fails on properties that make new objects, "
                                   'which CEResNet has; its CE layers compile there')
@pytest.mark.parametrize('training', [
    pytest.param(True, marks=pytest.mark.long), False], ids=['train', 'eval'])
def test_torch_compile_without_graph_breaks(training):
    """The whole backbone; tracing needs no compiler."""
    plain = CEResNet(18, **SLIM)
    plain.train(training)  # returns None in MMDetection
    compiled = torch.compile(copy.deepcopy(plain), backend='aot_eager', fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    for ours, expected in zip(compiled(x), plain(x)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
