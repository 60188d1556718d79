"""insert_ce and the CE norms, on networks in the styles of torchvision, timm and MMDetection."""
import pytest
import torch
from helpers.networks import SLIM, images, trained
from helpers.norms import (
    BatchNormAct2d,
    ConvNeXtLayerNorm,
    DetrFrozenBatchNorm2d,
    FrozenBatchNorm2d,
    LayerNorm2d,
)
from mmcv.cnn import build_norm_layer
from mmdet.models.backbones import ResNet
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cenet_mmdet import CE, CEResNet, SyncCE, insert_ce
from cenet_mmdet.models.insert import NormCE
from cenet_mmdet.utils.errors import InputError


class TorchvisionBlock(nn.Module):
    """A basic block as torchvision writes it: norms as attributes, one rectifier for all."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)).add_(x))


def torchvision_style():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                         TorchvisionBlock(8), TorchvisionBlock(8))


def timm_style():
    return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3),
                         BatchNormAct2d(8))


def other_norms():
    norms = (BatchNormAct2d(8, nn.PReLU), FrozenBatchNorm2d(8), DetrFrozenBatchNorm2d(8),
             LayerNorm2d(8), ConvNeXtLayerNorm(8), nn.GroupNorm(1, 8), nn.InstanceNorm2d(8))
    return nn.Sequential(nn.Conv2d(3, 8, 1),
                         *(nn.Sequential(nn.Conv2d(8, 8, 3), norm) for norm in norms))


def mmdet_style(**options):
    return ResNet(50, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1),
                  zero_init_residual=False, **SLIM, **options)


STYLES = {
    'torchvision': (torchvision_style, r'\d\.bn2', ['3.bn2', '4.bn2']),
    'timm': (timm_style, '.*', ['1', '3']),
    'other norms': (other_norms, '.*', [f'{i}.1' for i in range(1, 8)]),
    'mmdet': (mmdet_style, r'layer\d\.\d\.bn3', [f'layer1.{i}.bn3' for i in range(3)]
              + [f'layer2.{i}.bn3' for i in range(4)]),
}


def outputs(model):
    out = model(images(2, 32, 32))
    return out if isinstance(out, tuple) else (out, )


def evaluated(model):
    model.eval()  # returns None in MMDetection's ResNet
    return outputs(model)


def of_kind(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize('style', STYLES)
class TestStyles:

    def test_places_and_training(self, style):
        """CE stands where asked for, learns, and comes before the rectifier."""
        make, where, names = STYLES[style]
        model = insert_ce(make(), where, dict(group_size=4))
        layers = of_kind(model, CE)
        assert [name for name, m in model.named_modules() if isinstance(m, NormCE)] == names
        assert len(layers) == len(names)
        assert all(layer.group_size == 4 for layer in layers)
        signs = []
        for layer in layers:
            layer.register_forward_hook(lambda m, x, y: signs.append(bool((x[0] < 0).any())))
        sum(o.mean() for o in outputs(model)).backward()
        assert signs == [True] * len(names)  # features not yet rectified
        assert all(layer.lambda_logit.grad is not None for layer in layers)
        assert all(layer.num_batches_tracked == 1 for layer in layers)

    def test_parents_checkpoint_loads(self, style, tmp_path):
        """By torch and by MMEngine: all of the parent's entries, and nothing else is missing."""
        make, where, _ = STYLES[style]
        torch.manual_seed(0)
        parent = make()
        for _ in range(2):
            outputs(parent)
        expected = evaluated(parent)
        model, reloaded = (insert_ce(make(), where) for _ in range(2))
        result = model.load_state_dict(parent.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all('.ce.' in key for key in result.missing_keys)
        save_checkpoint(parent.state_dict(), str(tmp_path / 'parent.pth'))
        load_checkpoint(reloaded, str(tmp_path / 'parent.pth'))
        for network in (model, reloaded):
            for layer in of_kind(network, CE):  # as good as absent: W = I, lambda = 1
                layer.lambda_logit.data.fill_(100)
            torch.testing.assert_close(evaluated(network), expected)


class TestSelection:

    def test_a_function_selects(self):
        model = insert_ce(torchvision_style(), lambda name, norm: norm.num_features == 8
                          and name != '1')
        assert len(of_kind(model, CE)) == 4

    def test_sync_ce_and_other_layers(self):
        model = insert_ce(torchvision_style(), '1', dict(type='SyncCE', bd_ratio=1.0))
        assert type(model[1].ce) is SyncCE
        assert insert_ce(torchvision_style(), '1', dict(type=nn.BatchNorm2d))[1].ce.num_features \
            == 8

    def test_before_the_norm(self):
        model = insert_ce(torchvision_style(), '1', before=True)
        assert model[1].before
        order = []
        model[1].norm.register_forward_hook(lambda *_: order.append('norm'))
        model[1].ce.register_forward_hook(lambda *_: order.append('ce'))
        outputs(model)
        assert order == ['ce', 'norm']

    def test_a_shared_norm_stays_shared(self):
        norm = nn.BatchNorm2d(3)
        model = insert_ce(nn.Sequential(norm, nn.ReLU(), norm), '0', dict(group_size=3))
        assert isinstance(model[0], NormCE)
        assert model[0] is model[2]

    def test_a_norm_alone_and_group_norm(self):
        assert isinstance(insert_ce(nn.GroupNorm(2, 8), '').ce, CE)

    @pytest.mark.parametrize('norm', [nn.LayerNorm(8), ConvNeXtLayerNorm(8, channels_first=False),
                                      nn.LayerNorm((8, 4, 4))])
    def test_norms_over_the_last_dimension_are_refused(self, norm):
        model = nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(norm))
        with pytest.raises(InputError, match=r'selects 1\.0: .* dimension 1.* There are: 0$'):
            insert_ce(model, '.*')
        assert type(model[0]) is nn.BatchNorm2d

    def test_twice_is_not_twice(self):
        model = insert_ce(torchvision_style(), '1')
        with pytest.raises(ValueError, match='selects no normalization layer'):
            insert_ce(model, r'1(\.norm)?')

    @pytest.mark.parametrize('where', ['layer1', r'\d\.conv1', lambda name, norm: False])
    def test_nothing_selected_lists_what_there_is(self, where):
        with pytest.raises(ValueError, match=r'There are: 1, 3\.bn1, 3\.bn2, 4\.bn1, 4\.bn2$'):
            insert_ce(torchvision_style(), where)

    def test_a_network_without_norms(self):
        with pytest.raises(ValueError, match='none, the network has no norm'):
            insert_ce(nn.Sequential(nn.Conv2d(3, 8, 3)), '.*')

    def test_an_unknown_layer(self):
        with pytest.raises(ValueError, match="no layer 'Nothing' in the registry"):
            insert_ce(torchvision_style(), '1', dict(type='Nothing'))


IDENTITY = dict(identity_start=True)
PLUGIN = dict(cfg=dict(type='CE', **IDENTITY), stages=(True, True), position='after_conv3')


@pytest.mark.parametrize('with_ce', [
    lambda: insert_ce(mmdet_style(), '.*', IDENTITY),
    lambda: insert_ce(mmdet_style(), '.*', dict(type='SyncCE', **IDENTITY)),
    lambda: mmdet_style(plugins=[PLUGIN]),
    lambda: mmdet_style(norm_cfg=dict(type='CEBN', ce_cfg=IDENTITY)),
    lambda: CEResNet(50, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1),
                     ce_blocks=[(0, 1), (2, )], ce_cfg=IDENTITY, **SLIM)],
    ids=['inserted', 'SyncCE', 'plugin', 'norm_cfg', 'CEResNet'])
def test_a_trained_network_starts_from_where_it_is(with_ce):
    """In training and evaluation; then CE learns."""
    plain, network = trained(mmdet_style()), with_ce()
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all('ce' in name for name in missing)
    for training in (True, False):
        plain.train(training)
        network.train(training)
        torch.testing.assert_close(network(images()), plain(images()), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network.train()
    network(images())[1].square().mean().backward()
    optimizer.step()
    assert all(ce.strength != 0 for ce in network.modules() if isinstance(ce, CE))


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm,
                                     SyncCE.convert_sync_ce, lambda model: SyncCE.convert_sync_ce(
                                         nn.SyncBatchNorm.convert_sync_batchnorm(model))])
def test_conversions_keep_ce_and_activation(convert):
    """All inserted layers, and the activations behind them, run after it."""
    model = convert(insert_ce(timm_style(), '.*'))
    calls = []
    for module in of_kind(model, NormCE):
        module.ce.register_forward_hook(lambda *_: calls.append('ce'))
        module.act.register_forward_hook(lambda *_: calls.append('act'))
    outputs(model)
    assert calls == ['ce', 'act'] * 2


class TestNormCfg:
    """norm_cfg=dict(type='CEBN') in models that know nothing of it."""

    NORMS = {'CEBN': {}, 'CESyncBN': {}, 'CEIN': dict(affine=True), 'CEGN': dict(num_groups=4)}

    @staticmethod
    def resnet(kind, **norm_cfg):
        return mmdet_style(norm_eval=False, norm_cfg=dict(type=kind, **norm_cfg))

    @pytest.mark.parametrize('kind', ['CEBN', 'CEIN', 'CEGN'])
    def test_every_norm_gets_ce(self, kind):
        model = self.resnet(kind, ce_cfg=dict(group_size=4), **self.NORMS[kind])
        model.init_weights()
        outputs(model)[-1].mean().backward()
        layers = of_kind(model, CE)
        assert len(layers) == 24
        assert {layer.group_size for layer in layers} == {4}
        assert all(layer.num_batches_tracked == 1 for layer in layers)

    @pytest.mark.parametrize('kind', NORMS)
    def test_plain_weights_load(self, kind):
        plain = self.resnet(kind[2:], **self.NORMS[kind])
        model = self.resnet(kind, **self.NORMS[kind])
        result = model.load_state_dict(plain.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all('.ce.' in key for key in result.missing_keys)

    def test_conversions_reach_the_norm_and_leave_ce(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(self.resnet('CEBN'))
        assert isinstance(model.bn1.norm, nn.SyncBatchNorm)
        assert type(model.bn1.ce) is CE
        model = SyncCE.convert_sync_ce(model)
        assert type(model.bn1.ce) is SyncCE

    def test_norm_eval_reaches_the_norm(self):
        model = mmdet_style(norm_cfg=dict(type='CEBN'), norm_eval=True, frozen_stages=1)
        model.train()
        assert not any(norm.training for norm in of_kind(model, _BatchNorm))
        assert not model.layer1[0].bn1.ce.training  # its stage is frozen
        assert model.layer2[0].bn1.ce.training

    @pytest.mark.parametrize(('freeze', 'learns'), [
        ('none', True), ('adaptive', False), ('all', False)])
    def test_freeze(self, freeze, learns):
        """MMCV lets all parameters of a norm learn once it is built; CE's are frozen again."""
        for use in (lambda norm: norm.to('cpu'), lambda norm: norm.train(),
                    lambda norm: norm.eval()):
            _, norm = build_norm_layer(dict(type='CEBN', ce_cfg=dict(freeze=freeze)), 16)
            use(norm)
            assert norm.norm.weight.requires_grad
            assert {p.requires_grad for p in norm.ce.parameters()} == {learns}
        _, norm = build_norm_layer(dict(type='CEBN', requires_grad=False), 16)
        assert not any(p.requires_grad for p in norm.parameters())

    def test_initialization_spares_ce(self):
        """`zero_init_residual` sets all weights in a norm's place to 0: IR cannot learn from it."""
        model = ResNet(50, norm_cfg=dict(type='CEBN'), **SLIM)
        model.init_weights()
        last = model.layer1[0].bn3
        assert not last.norm.weight.any()
        assert all(layer.weight.any() for layer in last.ce.reweighting if hasattr(layer, 'weight'))

        outputs(model)  # trained CE keeps its weights
        weight = model.bn1.ce.reweighting[0].weight.clone()
        model.init_weights()
        assert model.bn1.ce.num_batches_tracked == 1
        assert torch.equal(model.bn1.ce.reweighting[0].weight, weight)

    @pytest.mark.parametrize('kind', ['IterNorm', 'DBN'])
    def test_decorrelating_norms(self, kind):
        model = MODELS.build(dict(type='mmdet.ResNet', depth=18, **SLIM,
                                  norm_cfg=dict(type=kind, requires_grad=True)))
        outputs(model)[-1].mean().backward()
        assert type(model.bn1).__name__ == kind
        assert model.bn1.weight.grad is not None
