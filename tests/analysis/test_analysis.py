"""Measurements of channels, on networks of which the answers are known."""
import math
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from mmdet.models.backbones import MobileNetV2, ResNet
from torch import nn

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.analysis import (
    ChannelCorrelations,
    ChannelMagnitudes,
    GammaGrowth,
    ReweightingSpread,
    ablation_curve,
    feature_magnitude,
    gammas,
    lambdas,
    norm_ce_pairs,
    spectra,
    zero_channels,
)
from cenet_mmdet.analysis.collector import Collector
from cenet_mmdet.models.insert import NormCE
from cenet_mmdet.models.norm_layers import CEBN, CEGN

SLIM = dict(base_channels=8, stem_channels=8)
EXACT = dict(rtol=1e-10, atol=1e-10)


def images(n=4, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)


def trained(network):
    """In evaluation, with statistics, gammas and lambdas that no initial network has."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
            elif isinstance(module, CE) and module.bd_ratio is None:
                module.lambda_logit.copy_(torch.randn(1, generator=generator))
        network.double().train()  # MMDetection's returns None
        for seed in range(3):
            network(images(seed=10 + seed))
    network.eval()
    return network


@pytest.fixture(scope='module')
def ce_resnet18():
    return trained(CEResNet(18, **SLIM, ce_cfg=dict(group_size=4)))


@pytest.fixture(scope='module')
def ce_resnet50():
    return trained(CEResNet(50, **SLIM, ce_cfg=dict(group_size=4)))


@pytest.fixture(scope='module')
def resnet():
    return trained(ResNet(18, **SLIM, zero_init_residual=False))


def evaluated(network):
    network.double().eval()
    return network


def measure(collector, *batches, **options):
    with collector, torch.no_grad():
        for batch in batches:
            collector._model(batch)
    return collector.result(**options)


@contextmanager
def seen_at(layer):
    """Input and output of the last call of a layer, before others change them in place."""
    seen = {}
    hook = layer.register_forward_hook(
        lambda _, args, out: seen.update(input=args[0].clone(), output=out.clone()))
    yield seen
    hook.remove()


def norm_of(gamma):
    """A batch norm that is x -> gamma x, but for its eps, in evaluation."""
    norm = nn.BatchNorm2d(len(gamma), eps=1e-12).double().eval()
    norm.weight.data.copy_(torch.as_tensor(gamma))
    return norm


def ce_of(channels, **options):
    return CE(channels, **{'group_size': None, 'eps': 1e-12, **options}).double().eval()


def maps_of(covariance, samples=6, pixels=20):
    """Feature map (N, C, 4, L/4) whose covariance is exactly the one given, and mean not 0."""
    channels = len(covariance)
    generator = torch.Generator().manual_seed(2)
    white = torch.randn(samples * pixels, channels, generator=generator, dtype=torch.float64)
    white, _ = torch.linalg.qr(white - white.mean(0))
    rows = math.sqrt(len(white)) * white @ torch.linalg.cholesky(covariance).T
    rows = rows + torch.arange(1., channels + 1, dtype=torch.float64)
    return rows.view(samples, 4, pixels // 4, channels).permute(0, 3, 1, 2).contiguous()


RHO = torch.tensor([[1, 0.5, -0.2], [0.5, 1, 0.1], [-0.2, 0.1, 1]], dtype=torch.float64)


# Inhibited channels

def scaled(factors, rectifier):
    """Network that multiplies each channel by a factor and rectifies."""
    layer = nn.Conv2d(len(factors), len(factors), 1, groups=len(factors), bias=False)
    layer.weight.data.copy_(torch.tensor(factors).view(-1, 1, 1, 1))
    return nn.Sequential(layer, rectifier).eval()


def test_inhibited_channels_are_those_of_small_magnitude():
    network = scaled([0., -3., 0.009, 0.011, 2.], nn.ReLU(inplace=True))
    result = measure(ChannelMagnitudes(network), torch.ones(2, 5, 3, 4), torch.ones(1, 5, 2, 2))
    assert list(result.magnitudes) == ['1']
    magnitudes = torch.tensor([0, 0, 0.009, 0.011, 2], dtype=torch.float64)
    torch.testing.assert_close(result.magnitudes['1'], magnitudes, rtol=0, atol=1e-8)
    assert result.shares == {'1': 0.6}
    assert measure(ChannelMagnitudes(network), torch.ones(1, 5, 2, 2), threshold=0.02).share == 0.8


def test_magnitude_is_the_mean_of_absolute_values_over_images_and_positions():
    network = scaled([1., -1.], nn.LeakyReLU(0.1))
    x = torch.tensor([1., -2., 3., 0.]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    result = measure(ChannelMagnitudes(network), x)
    torch.testing.assert_close(result.magnitudes['1'],
                               torch.tensor([4.2 / 4, 2.4 / 4], dtype=torch.float64))


def test_share_of_all_layers_counts_channels_rather_than_layers():
    network = nn.Sequential(scaled([0., 1.], nn.ReLU()), nn.Conv2d(2, 6, 1), nn.SiLU())
    network[1].weight.data.zero_()
    network[1].bias.data.fill_(1)
    result = measure(ChannelMagnitudes(network), torch.ones(1, 2, 2, 2))
    assert result.shares == {'0.1': 0.5, '2': 0}
    assert result.share == 1 / 8


@pytest.mark.parametrize('name', ['CE-ResNet-50', 'ResNet-50'])
def test_one_rectifier_called_three_times_is_three_layers(name, ce_resnet50):
    network = ce_resnet50 if name == 'CE-ResNet-50' else trained(ResNet(50, **SLIM))
    block = network.layer1[0]
    with seen_at(block) as seen:
        found = measure(ChannelMagnitudes(network), images()).magnitudes
    calls = [f'layer1.0.relu#{i}' for i in (1, 2, 3)]
    assert [label for label in found if label.startswith('layer1.0.')] == calls
    with torch.no_grad():
        first = block.bn1(block.conv1(seen['input'])).relu()
        second = block.bn2(block.conv2(first)).relu()
    for label, expected in zip(calls, (first, second, seen['output'])):
        torch.testing.assert_close(found[label], expected.mean((0, 2, 3)), **EXACT)
    assert len({found[label].mean().item() for label in calls}) == 3


def test_rectifiers_of_whole_networks(ce_resnet18, resnet):
    labels = [f'layer{stage}.{block}.relu#{call}'
              for stage in (1, 2, 3, 4) for block in (0, 1) for call in (1, 2)]
    for network in (resnet, ce_resnet18):  # in the latter, F has rectifiers as well
        assert list(measure(ChannelMagnitudes(network), images(1)).magnitudes) == ['relu', *labels]
    mobilenet = evaluated(MobileNetV2(widen_factor=0.25))
    found = measure(ChannelMagnitudes(mobilenet), images(1)).magnitudes
    assert len(found) == 1 + 1 + 2 * 16 + 1
    assert found['layer2.0.expand_conv.activate'].shape == (48, )  # 6 * 8


def test_layers_are_chosen_by_regular_expressions(resnet):
    chosen = measure(ChannelMagnitudes(resnet, [r'layer[12]\.1\.relu', 'relu']), images(1))
    assert list(chosen.magnitudes) == ['relu', 'layer1.1.relu#1', 'layer1.1.relu#2',
                                       'layer2.1.relu#1', 'layer2.1.relu#2']


# gamma

WHITENING = torch.tensor([[[2., 1.], [1., 3.]], [[0., -1.], [-1., 0.5]]], dtype=torch.float64)


def known_whitening():
    network = nn.Sequential(norm_of([1., -2., 0.001, 4.]), ce_of(4, group_size=2),
                            nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 4))
    network[1].running_whitening.copy_(WHITENING)
    return network


def test_effective_gamma_is_that_of_the_whitening_matrix():
    network = known_whitening()
    found = gammas(network, pairs={'0': '1'})
    assert list(found) == ['0', '3']
    assert found['0'].magnitude.tolist() == pytest.approx([1, 2, 0.001, 4])
    assert found['0'].share == 0.25
    assert found['0'].effective.tolist() == pytest.approx([0, 5, 4, 1.999])
    assert found['0'].effective_share == 0.25
    assert found['3'].effective is None and found['3'].effective_share is None
    assert gammas(network, threshold=3)['0'].share == 0.75
    assert gammas(network)['0'].effective is None


PLUGINS = [dict(cfg=dict(type='CE', group_size=4, postfix=i), position=f'after_conv{i}',
                stages=(True, False, False, False)) for i in (1, 2, 3)]


class BatchNormAct(nn.BatchNorm2d):
    """A norm with its activation inside, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


def blocks(number, stages=range(1, 5), sizes=(2, 2, 2, 2)):
    return {f'layer{stage}.{i}.bn{number}': f'layer{stage}.{i}.ce'
            for stage in stages for i in range(sizes[stage - 1])}


PAIRS = {
    'ResNet': (lambda: ResNet(18, **SLIM), {}),
    'CE-ResNet-18': (lambda: CEResNet(18, **SLIM), {'bn1': 'ce1', **blocks(2)}),
    'CE-ResNet-50': (lambda: CEResNet(50, **SLIM, ce_position='second', ce_stem=False),
                     blocks(2, (1, 2, 3), (3, 4, 6))),
    # After the first two convolutions, MMDetection calls plugins behind the rectifier.
    'plugins': (lambda: ResNet(50, **SLIM, plugins=PLUGINS),
                {f'layer1.{i}.bn3': f'layer1.{i}.ce3' for i in range(3)}),
    'norm_cfg': (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), CEBN(8), nn.ReLU(),
                                       CEGN(8, num_groups=2)),
                 {'1.norm': '1.ce', '3.norm': '3.ce'}),
    'CE first': (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), NormCE(nn.BatchNorm2d(8), CE(8), True)),
                 {}),
    'timm': (lambda: insert_ce(nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct(8)), '.*'),
             {'1': '1.act.ce'}),
}


@pytest.mark.parametrize('name', PAIRS)
def test_pairs_of_norm_and_ce_are_seen_at_run_time(name):
    make, expected = PAIRS[name]
    network = make()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    next(network.children()).eval()
    assert norm_ce_pairs(network, lambda: network(images(2, 32).float())) == expected
    assert network.training and not next(network.children()).training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def newton(sigma, steps):
    p = torch.eye(len(sigma), dtype=sigma.dtype)
    for _ in range(steps):
        p = 0.5 * (3 * p - p @ p @ p @ sigma / sigma.trace())
    return p


@pytest.mark.parametrize('steps', [1, 3])
def test_gamma_hat_is_newtons_matrix_of_the_measured_covariance_times_gamma(steps):
    gamma = torch.tensor([0.3, -2., 1.], dtype=torch.float64)
    network = nn.Sequential(norm_of(gamma), ce_of(3, num_iters=steps))
    x = maps_of(RHO)
    growth = measure(GammaGrowth(network, {'0': '1'}), x[:2], x[2:])['1']
    expected = newton(torch.outer(gamma, gamma) * RHO, steps) @ gamma
    torch.testing.assert_close(growth.gamma_hat, expected, rtol=1e-9, atol=1e-9)
    assert growth.ratio == pytest.approx((expected.norm() / gamma.norm()).item())
    assert growth.share == (expected.abs() > gamma.abs()).double().mean()
    if steps == 1:  # for which part (1) is a theorem
        assert growth.share == 1


def test_gamma_that_does_not_grow_is_reported_as_such():
    # Three Newton steps: the small channel is turned around by the large one beside it.
    rho = torch.tensor([[1, 0.9], [0.9, 1]], dtype=torch.float64)
    gamma = torch.tensor([1., 0.3], dtype=torch.float64)
    network = nn.Sequential(norm_of(gamma), ce_of(2))
    growth = measure(GammaGrowth(network, {'0': '1'}), maps_of(rho))['1']
    assert growth.share == 0.5
    assert growth.ratio > 1


def test_gamma_growth_is_of_each_group(ce_resnet18):
    pairs = norm_ce_pairs(ce_resnet18, lambda: ce_resnet18(images(1)))
    ce = ce_resnet18.layer2[0].ce
    with seen_at(ce) as seen:
        growth = measure(GammaGrowth(ce_resnet18, pairs), images())
    assert list(growth) == list(pairs.values())
    rows = seen['input'].movedim(1, -1).flatten(0, 2)
    gamma = ce_resnet18.layer2[0].bn2.weight.detach()
    for group in range(4):
        channels = slice(4 * group, 4 * group + 4)
        sigma = rows[:, channels].T.cov(correction=0) + ce.eps * torch.eye(4)
        torch.testing.assert_close(growth['layer2.0.ce'].gamma_hat[channels],
                                   newton(sigma, 3) @ gamma[channels], **EXACT)


# Magnitude of features

def test_feature_magnitude_is_the_norm_over_channels():
    network = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.5))
    x = torch.tensor([3., -4.]).view(1, 2, 1, 1).repeat(2, 1, 3, 5)
    ones = torch.ones(2, 3, 5, dtype=torch.float64)
    # Before the rectifier overwrites it.
    assert torch.equal(feature_magnitude(network, x.clone(), '0'), 5 * ones)
    # In evaluation, in which dropout does nothing.
    assert torch.equal(feature_magnitude(network, x.clone(), '2'), 3 * ones)
    assert network.training


def test_feature_magnitude_of_norm_and_ce(ce_resnet18):
    with torch.no_grad():
        x = ce_resnet18.bn1(ce_resnet18.conv1(images(2)))
        for layer, y in (('bn1', x), ('ce1', ce_resnet18.ce1(x))):
            torch.testing.assert_close(feature_magnitude(ce_resnet18, images(2), layer),
                                       y.square().sum(1).sqrt(), **EXACT)
    first, second = (feature_magnitude(ce_resnet18, images(2), f'layer1.0.relu#{i}')
                     for i in (1, 2))
    assert first.shape == second.shape and not torch.allclose(first, second)


# Correlations

def test_correlation_of_a_norm_is_that_of_its_input():
    network = nn.Sequential(norm_of([0.1, -2., 3.]))
    x = maps_of(RHO)
    found = measure(ChannelCorrelations(network), x[:1], x[1:])
    assert list(found) == ['0'] and list(found['0']) == ['output']
    assert found['0']['output'].mean == pytest.approx((0.5 + 0.2 + 0.1) / 3, abs=1e-12)
    assert found['0']['output'][1:] == (3, 0)


@pytest.mark.parametrize('ratio', [0.0, 0.7, 1.0])
def test_correlations_in_ce_of_known_operators(ratio):
    ce = ce_of(3, bd_ratio=ratio)
    values, vectors = torch.linalg.eigh(RHO)
    inverse_root = vectors @ values.rsqrt().diag() @ vectors.T
    if ce.has_bd:
        ce.running_whitening.copy_(inverse_root)
    if ce.has_ir:  # all gates 1/2
        ce.reweighting[3].weight.data.zero_()
    found = measure(ChannelCorrelations(nn.Sequential(ce)), maps_of(RHO))['0']
    whole = (0.5 + 0.2 + 0.1) / 3
    assert list(found) == [p for p in ('input', 'bd', 'ir', 'output')
                           if (p, ratio) not in (('bd', 0), ('ir', 1))]
    assert found['input'].mean == pytest.approx(whole)
    if ce.has_bd:
        assert found['bd'].mean < 1e-12
    if ce.has_ir:
        assert found['ir'].mean == pytest.approx(whole)
    operator = ratio * inverse_root + (1 - ratio) * torch.eye(3).double() / 2
    covariance = operator @ RHO @ operator
    deviation = covariance.diagonal().sqrt()
    expected = (covariance / torch.outer(deviation, deviation)).abs().sum().item() - 3
    assert found['output'].mean == pytest.approx(expected / 6, abs=1e-12)


def test_correlations_of_a_network_are_those_of_its_feature_maps(ce_resnet18):
    ce = ce_resnet18.layer3[1].ce
    with seen_at(ce) as points:
        found = measure(ChannelCorrelations(ce_resnet18), images())
    x = points['input']
    n, c = x.shape[:2]
    with torch.no_grad():
        weights = ce.reweighting(x.var((2, 3))) / ce.running_scale
        whitened = ce.running_whitening @ x.reshape(n, c // 4, 4, -1)
    points.update(bd=whitened.reshape(x.shape), ir=weights[..., None, None] * x)
    for point, y in points.items():
        matrix = y.transpose(0, 1).flatten(1).corrcoef().abs()
        expected = (matrix.sum() - c) / (c * (c - 1))
        assert found['layer3.1.ce'][point].mean == pytest.approx(expected.item(), abs=1e-10)
    assert list(found)[:2] == ['ce1', 'layer1.0.ce'] and len(found) == 9  # in the order of calls


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_constant_channels_have_no_correlation(dtype):
    network = nn.Sequential(norm_of([1.] * 5), ce_of(5, bd_ratio=1.0)).to(dtype)
    x = maps_of(RHO)
    # The mean of many 2.9 is not 2.9; their deviation is not 0, but within rounding.
    x = torch.cat([x, torch.full_like(x[:, :1], 2.9), torch.zeros_like(x[:, :1])], 1).to(dtype)
    found = measure(ChannelCorrelations(network, '.*'), x[:1], x[1:])
    for correlation in (found['0']['output'], *found['1'].values()):
        assert correlation.mean == pytest.approx(0.8 / 3, abs=1e-5)
        assert correlation[1:] == (3, 2)
    x[:, 1:] = 0
    alone = measure(ChannelCorrelations(network), x)['1']['output']
    assert math.isnan(alone.mean) and alone[1:] == (1, 4)


def test_norms_are_measured_where_there_is_no_ce_or_they_are_named(resnet, ce_resnet18):
    found = measure(ChannelCorrelations(resnet), images(2))
    assert len(found) == 1 + 2 * 8 + 3
    assert list(found)[:3] == ['bn1', 'layer1.0.bn1', 'layer1.0.bn2']
    both = measure(ChannelCorrelations(ce_resnet18, [r'layer2\.0\.(ce|bn2)']), images(2))
    assert list(both) == ['layer2.0.bn2', 'layer2.0.ce']
    assert both['layer2.0.bn2']['output'] == both['layer2.0.ce']['input']


# Operators

def test_lambda_of_each_layer():
    network = nn.Sequential(ce_of(4), ce_of(4, bd_ratio=0.25), ce_of(4, bd_ratio=1.0))
    network[0].lambda_logit.data.fill_(math.log(4))  # sigmoid(log 4) = 0.8
    assert lambdas(network) == pytest.approx({'0': 0.8, '1': 0.25, '2': 1})


def test_spectrum_of_the_whitening_matrix():
    network = known_whitening()
    found = spectra(nn.Sequential(network, ce_of(4, bd_ratio=0.0)))
    assert list(found) == ['0.1']
    root = math.sqrt(5) / 2, math.sqrt(0.25 + 4) / 2
    expected = [[2.5 - root[0], 2.5 + root[0]], [0.25 - root[1], 0.25 + root[1]]]
    torch.testing.assert_close(found['0.1'].eigenvalues, torch.tensor(expected).double())
    torch.testing.assert_close(found['0.1'].condition, torch.tensor(
        [expected[0][1] / expected[0][0], -expected[1][1] / expected[1][0]]).double())


def test_spread_of_the_weights_over_images():
    class Gates(nn.Module):
        """In place of F: the variances themselves, the second channel's always 3."""

        def forward(self, variance):
            return torch.stack([variance[:, 0], torch.full_like(variance[:, 1], 3)], 1)

    ce = ce_of(2)
    ce.reweighting = Gates()
    deviations = torch.tensor([1., 2., 3.]).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64) * deviations.view(-1, 1, 1, 1)
    network = nn.Sequential(ce)
    found = measure(ReweightingSpread(network), x[:1], x[1:])['0']
    variances = deviations.square()
    expected = (variances.std(correction=0) / variances.mean()).item()
    assert found.per_channel.tolist() == pytest.approx([expected, 0])
    assert found.mean == pytest.approx(expected / 2)


# Streaming

@pytest.mark.parametrize('collector', [ChannelMagnitudes, ChannelCorrelations, ReweightingSpread,
                                       GammaGrowth])
def test_batches_add_up_to_what_all_images_give(collector, ce_resnet18):
    pairs = {'bn1': 'ce1', 'layer4.1.bn2': 'layer4.1.ce'}
    arguments = [pairs] if collector is GammaGrowth else []
    x = images(5)
    parts, whole = (measure(collector(ce_resnet18, *arguments), *batches)
                    for batches in ((x[:1], x[1:]), (x, )))
    torch.testing.assert_close(as_plain(parts), as_plain(whole), **EXACT)


def as_plain(result):
    """Named tuples as lists, of which assert_close takes tensors and numbers."""
    if isinstance(result, dict):
        return {key: as_plain(value) for key, value in result.items()}
    return [as_plain(value) for value in result] if isinstance(result, tuple) else result


def test_large_offsets_cost_no_digits():
    x = maps_of(RHO) + 1e6
    found = measure(ChannelCorrelations(nn.Sequential(norm_of([1.] * 3))), x[:3], x[3:])
    assert found['0']['output'].mean == pytest.approx(0.8 / 3, abs=1e-7)


@pytest.mark.parametrize('collector', [ChannelMagnitudes, ChannelCorrelations, ReweightingSpread])
def test_measuring_changes_nothing(collector, ce_resnet18):
    before = ce_resnet18(images(1))[-1]
    measurement = collector(ce_resnet18)
    with measurement:
        assert not ce_resnet18(images(2))[0].isnan().any()
    torch.testing.assert_close(ce_resnet18(images(1))[-1], before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ce_resnet18.modules())
    measurement.result()


def test_mixed_precision_is_for_the_model_alone():
    network = nn.Sequential(ce_of(16)).float()  # CE leaves autocast by itself
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    exact = measure(ChannelCorrelations(network), x)['0']
    with torch.autocast('cpu', torch.bfloat16):
        assert measure(ChannelCorrelations(network), x)['0'] == exact


# Ablation

class Living(nn.Module):
    """Its output is 1 where a channel lives, so the metric is their share."""

    def __init__(self, channels=20, ce=None):
        super().__init__()
        self.norm = norm_of([1.] * channels)
        self.ce = ce

    def forward(self, x):
        x = self.norm(x)
        return x if self.ce is None else self.ce(x)


def dead_channels(x):
    return (x == 0).flatten(2).all(-1).all(0)


def share_of_living(model):
    assert not model.training
    return (model(torch.ones(2, 20, 3, 3, dtype=torch.float64)) != 0).double().mean()


@pytest.mark.parametrize('ce', [None, 20])
def test_metric_falls_with_the_share_of_zeroed_channels(ce):
    model = Living(ce=ce and ce_of(20, bd_ratio=1.0))
    if ce:  # which would bring zeroed channels back, were they zeroed in front of it
        model.ce.running_whitening.add_(1)
    model.train()
    model.norm.eval()
    fractions = [0, 0.25, 0.5, 0.9, 1]
    curve = ablation_curve(model, share_of_living, 'norm', fractions, seeds=range(3))
    assert curve.shape == (3, 5) and curve.dtype == torch.float64
    torch.testing.assert_close(curve, (1 - torch.tensor(fractions).double()).expand(3, 5))
    assert model.training and not model.norm.training
    assert share_of_living(model.eval()) == 1


def test_living_channels_of_ce_see_the_whole_input(ce_resnet18):
    ce, x = ce_resnet18.layer1[0].ce, images(2)
    with torch.no_grad(), seen_at(ce) as whole:
        ce_resnet18(x)
    with zero_channels(ce_resnet18, r'layer1\.0\.bn2', 0.5, seed=0), torch.no_grad(), \
            seen_at(ce) as zeroed:
        ce_resnet18(x)
    dead = dead_channels(zeroed['output'])
    assert dead.sum() == 4
    torch.testing.assert_close(zeroed['output'][:, ~dead], whole['output'][:, ~dead], **EXACT)


def test_channels_of_a_fraction_are_among_those_of_a_larger_one():
    def dead(fraction, seed):
        with zero_channels(model, 'norm', fraction, seed):
            return set(torch.nonzero(model(x)[0, :, 0, 0] == 0).flatten().tolist())

    model, x = Living(), torch.ones(1, 20, 1, 1, dtype=torch.float64)
    assert dead(0.2, 7) < dead(0.4, 7) < dead(0.85, 7)
    assert [len(dead(f, 7)) for f in (0.2, 0.4, 0.85)] == [4, 8, 17]
    assert dead(0.4, 7) == dead(0.4, 7) != dead(0.4, 8)


def test_norms_with_inserted_ce_keep_their_names():
    plain = evaluated(ResNet(18, **SLIM))
    inserted = evaluated(insert_ce(ResNet(18, **SLIM), r'layer1\.\d\.bn2'))
    dead = []
    for network in (plain, inserted):
        with zero_channels(network, '.*', 0.5, 0), torch.no_grad(), \
                seen_at(network.layer1[1].bn2) as seen:
            network(images(1))
        dead.append(dead_channels(seen['output']))
    assert dead[0].sum() == 4 and torch.equal(*dead)


def test_model_is_restored_after_exceptions(ce_resnet18):
    def interrupt(model):
        model(images(1))
        raise KeyboardInterrupt

    before = ce_resnet18(images(1))[-1]
    with pytest.raises(KeyboardInterrupt):
        ablation_curve(ce_resnet18, interrupt, '.*', [0.5], [0])
    torch.testing.assert_close(ce_resnet18(images(1))[-1], before, rtol=0, atol=0)
    with pytest.raises(KeyboardInterrupt), ChannelMagnitudes(ce_resnet18):
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ce_resnet18.modules())


def test_ablation_trains_too(ce_resnet18):
    x = images(1).requires_grad_()
    with zero_channels(ce_resnet18, ['bn1', '.*bn2'], 0.5, 0):
        ce_resnet18(x)[-1].sum().backward()
    assert x.grad.abs().sum() > 0


# Errors

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()


class NotCalled(nn.Module):

    def __init__(self):
        super().__init__()
        self.a = nn.Identity()

    def forward(self, x):
        return x


def with_ce():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), CE(4), nn.ReLU()).eval()


SMALL = torch.ones(2, 3, 4, 4)

ERRORS = {
    'no rectifier': (lambda: ChannelMagnitudes(nn.Conv2d(3, 3, 1)), 'no rectifier module'),
    'only the rectifier in F': (lambda: ChannelMagnitudes(CE(4)), 'no rectifier module'),
    'pattern': (lambda: ChannelMagnitudes(plain(), ['2', 'relu']), "'relu' matches .* such as '2'"),
    'part of a name': (lambda: ChannelCorrelations(nn.Sequential(plain()), '0'), r"such as '0\.1'"),
    'glob': (lambda: ChannelMagnitudes(plain(), '*relu'), "no regular expression .* '\\.\\*'"),
    'empty': (lambda: ChannelMagnitudes(plain(), []), 'layers is empty'),
    'no image': (lambda: measure(ChannelMagnitudes(plain())), 'no image was seen'),
    'no image, correlation': (lambda: measure(ChannelCorrelations(plain())), 'no image was seen'),
    'empty batch': (lambda: measure(ChannelMagnitudes(plain()), SMALL[:0]), '2: .* none at all'),
    'empty batch, correlation': (lambda: measure(ChannelCorrelations(plain()), SMALL[:0]),
                                 '1: .* none at all'),
    'empty batch, spread': (lambda: measure(ReweightingSpread(with_ce()), SMALL[:0]),
                            '2: 0 images'),
    'one image': (lambda: measure(ReweightingSpread(with_ce()), SMALL[:1]), '2: 1 images'),
    'NaN': (lambda: measure(ChannelMagnitudes(plain()), SMALL * math.nan), '2: .* NaN'),
    'NaN, correlation': (lambda: measure(ChannelCorrelations(with_ce()), SMALL * math.nan),
                         '2: .* NaN'),
    'threshold': (lambda: measure(ChannelMagnitudes(plain()), SMALL, threshold=0.), 'threshold'),
    'training': (lambda: measure(ChannelCorrelations(with_ce().train()), SMALL),
                 r'2: .* call model\.eval\(\)'),
    'training, spread': (lambda: measure(ReweightingSpread(with_ce().train()), SMALL),
                         r'2: .* call model\.eval\(\)'),
    'no gamma': (lambda: gammas(nn.BatchNorm2d(3, affine=False)), 'no norm with a gamma'),
    'gamma threshold': (lambda: gammas(plain(), threshold=-1), 'threshold must be positive'),
    'pairs of another network': (lambda: gammas(plain(), {'1': 'ce'}), "pairs names 'ce'"),
    'no pairs': (lambda: GammaGrowth(plain(), {}), 'pairs holds no norm'),
    'run that does not run': (lambda: norm_ce_pairs(with_ce(), lambda: None), 'none of the 1 CE'),
    'no such layer': (lambda: feature_magnitude(plain(), SMALL, 'bn'), "no layer 'bn'.*'0'"),
    'layer not called': (lambda: feature_magnitude(with_ce()[:2].append(NotCalled()), SMALL, '2.a'),
                         'no image was seen'),
    'no feature map': (lambda: feature_magnitude(CEResNet(18, **SLIM, allow_unset=True),
                                                 SMALL.repeat(1, 1, 16, 16), ''),
                       'expected a tensor .* got tuple'),
    'no CE': (lambda: lambdas(plain()), 'no CE layer'),
    'no BD': (lambda: spectra(CE(4, bd_ratio=0.0)), 'no CE layer with a BD branch'),
    'no IR': (lambda: ReweightingSpread(CE(4, bd_ratio=1.0)), 'no CE layer with an IR branch'),
    'fraction': (lambda: ablation_curve(plain(), len, '1', [1.5], [0]), r'fraction .* 1\.5'),
    'no fractions': (lambda: ablation_curve(plain(), len, '1', [], [0]), 'at least one fraction'),
    'no seeds': (lambda: ablation_curve(plain(), len, '1', [0.5], []), 'at least one fraction'),
    'no norm': (lambda: ablation_curve(plain(), len, '2', [0.5], [0]),
                "'2' matches .* such as '1'"),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors_name_the_thing_and_the_fix(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_call_of_a_part_is_no_pass(resnet):
    with pytest.raises(ValueError, match='call the model itself'), ChannelMagnitudes(resnet) as m:
        resnet.layer1(torch.randn(1, 8, 8, 8).double())
        m.result()


def test_layers_called_several_times_are_named_by_the_call(resnet):
    with pytest.raises(ValueError, match=r"called 2 times; .*'layer1\.0\.relu#1'"):
        feature_magnitude(resnet, images(1), 'layer1.0.relu')


def test_passes_with_other_calls_are_refused():
    class Varying(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x, times):
            for _ in range(times):
                x = self.relu(x)
            return x

    model = Varying()
    with ChannelMagnitudes(model) as measurement:
        model(SMALL, 2)
        with pytest.raises(ValueError, match=r'relu was called 1 times .* and 2 times'):
            model(SMALL, 1)
        with pytest.raises(ValueError, match='did not finish'):
            measurement.result()


def test_a_pass_that_failed_is_not_measured():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
    with ChannelMagnitudes(model) as measurement:
        with pytest.raises(RuntimeError):
            model(SMALL)
        with pytest.raises(ValueError, match='did not finish'):
            model(torch.ones(2, 4, 4, 4))
    with pytest.raises(ValueError, match='did not finish'):
        measurement.result()


def test_inference_mode_hides_changes_in_place():
    with torch.inference_mode():
        network = with_ce()
        with pytest.raises(ValueError, match=r'torch\.no_grad'):
            norm_ce_pairs(network, lambda: network(SMALL))
        with pytest.raises(ValueError, match=r'torch\.no_grad'), zero_channels(network, '1', .5, 0):
            network(SMALL)


def test_importing_needs_torch_alone():
    code = ('import sys\n'
            'class Hidden:\n'
            '    def find_spec(self, name, *_):\n'
            '        if name.split(".")[0] in ("mmdet", "mmcv", "mmengine", "matplotlib"):\n'
            '            raise ModuleNotFoundError(name)\n'
            'import importlib.util as util\n'
            'found = util.find_spec\n'
            'util.find_spec = lambda n, *a: None if n.startswith("mm") else found(n, *a)\n'
            'sys.meta_path.insert(0, Hidden())\n'
            'import cenet_mmdet.analysis\n')
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_collectors_say_what_they_are():
    for collector in (ChannelMagnitudes, ChannelCorrelations, ReweightingSpread, GammaGrowth):
        assert issubclass(collector, Collector)
