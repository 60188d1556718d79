"""Measurements of channels, on networks of which the answers are known."""
import math
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import pyplot as plt
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
    figures,
    gammas,
    lambdas,
    norm_ce_pairs,
    spectra,
    zero_channels,
)
from cenet_mmdet.analysis.modules import stage
from cenet_mmdet.analysis.report import measure_models
from cenet_mmdet.models.insert import NormCE
from cenet_mmdet.models.norm_layers import CEBN, CEGN

SLIM = dict(base_channels=8, stem_channels=8)
EXACT = dict(rtol=1e-10, atol=1e-10)
RHO = torch.tensor([[1, 0.5, -0.2], [0.5, 1, 0.1], [-0.2, 0.1, 1]], dtype=torch.float64)


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
def resnet():
    return trained(ResNet(18, **SLIM, zero_init_residual=False))


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


def scaled(factors, rectifier):
    """Network that multiplies each channel by a factor and rectifies."""
    layer = nn.Conv2d(len(factors), len(factors), 1, groups=len(factors), bias=False)
    layer.weight.data.copy_(torch.tensor(factors).view(-1, 1, 1, 1))
    return nn.Sequential(layer, rectifier).eval()


def test_inhibited_channels_are_those_of_small_magnitude():
    network = scaled([0., -3., 0.009, 0.011, 2.], nn.ReLU(inplace=True))
    result = measure(ChannelMagnitudes(network), torch.ones(2, 5, 3, 4), torch.ones(1, 5, 2, 2))
    magnitudes = torch.tensor([0, 0, 0.009, 0.011, 2], dtype=torch.float64)
    torch.testing.assert_close(result.magnitudes, {'1': magnitudes}, rtol=0, atol=1e-8)
    assert result.shares == {'1': 0.6}
    assert measure(ChannelMagnitudes(network), torch.ones(1, 5, 2, 2), threshold=0.02).share == 0.8
    # the mean of absolute values over images and positions
    x = torch.tensor([1., -2., 3., 0.]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    result = measure(ChannelMagnitudes(scaled([1., -1.], nn.LeakyReLU(0.1))), x)
    assert result.magnitudes['1'].tolist() == pytest.approx([4.2 / 4, 2.4 / 4])
    # channels are counted rather than layers
    network = nn.Sequential(scaled([0., 1.], nn.ReLU()), nn.Conv2d(2, 6, 1), nn.SiLU())
    network[1].weight.data.zero_()
    network[1].bias.data.fill_(1)
    result = measure(ChannelMagnitudes(network), torch.ones(1, 2, 2, 2))
    assert result.shares == {'0.1': 0.5, '2': 0} and result.share == 1 / 8


@pytest.mark.parametrize('kind', [CEResNet, ResNet])
def test_one_rectifier_called_three_times_is_three_layers(kind):
    network = trained(kind(50, **SLIM))
    block = network.layer1[0]
    with seen_at(block) as seen:
        found = measure(ChannelMagnitudes(network), images()).magnitudes
    with torch.no_grad():
        first = block.bn1(block.conv1(seen['input'])).relu()
        second = block.bn2(block.conv2(first)).relu()
    expected = {f'layer1.0.relu#{i}': x.mean((0, 2, 3))
                for i, x in enumerate((first, second, seen['output']), 1)}
    of_block = {label: x for label, x in found.items() if label.startswith('layer1.0.')}
    torch.testing.assert_close(of_block, expected, **EXACT)
    assert len({magnitude.mean().item() for magnitude in of_block.values()}) == 3


def test_rectifiers_of_whole_networks(ce_resnet18, resnet):
    labels = [f'layer{stage}.{block}.relu#{call}'
              for stage in (1, 2, 3, 4) for block in (0, 1) for call in (1, 2)]
    for network in (resnet, ce_resnet18):  # in the latter, F has rectifiers as well
        assert list(measure(ChannelMagnitudes(network), images(1)).magnitudes) == ['relu', *labels]
    chosen = measure(ChannelMagnitudes(resnet, [r'layer[12]\.1\.relu', 'relu']), images(1))
    assert list(chosen.magnitudes) == ['relu', 'layer1.1.relu#1', 'layer1.1.relu#2',
                                       'layer2.1.relu#1', 'layer2.1.relu#2']
    mobilenet = trained(MobileNetV2(widen_factor=0.25))
    found = measure(ChannelMagnitudes(mobilenet), images(1)).magnitudes
    assert len(found) == 1 + 1 + 2 * 16 + 1
    assert found['layer2.0.expand_conv.activate'].shape == (48, )  # 6 * 8


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
    assert found['0'].effective.tolist() == pytest.approx([0, 5, 4, 1.999])
    assert found['0'].share == found['0'].effective_share == 0.25
    assert found['3'].effective is None and found['3'].effective_share is None
    assert gammas(network, threshold=3)['0'].share == 0.75
    assert gammas(network)['0'].effective is None
    assert gammas(nn.BatchNorm2d(3, affine=False)) == {}


PLUGINS = [dict(cfg=dict(type='CE', group_size=4, postfix=i), position=f'after_conv{i}',
                stages=(True, False, False, False)) for i in (1, 2, 3)]


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
                                       CEGN(8, num_groups=2)), {'1': '1.ce', '3': '3.ce'}),
    'CE first': (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), NormCE(nn.BatchNorm2d(8), CE(8), True)),
                 {}),
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


@pytest.mark.parametrize(('gamma', 'rho', 'size', 'steps', 'share'), [
    ([0.3, -2., 1.], RHO, 3, 1, 1),  # for one step, part (1) is a theorem
    ([0.3, -2., 1., 1., -0.2, 3.], torch.block_diag(RHO, RHO) * 0.9 + 0.1, 3, 3, 1),
    # the small channel is turned around by the large one beside it
    ([1., 0.3], torch.tensor([[1, 0.9], [0.9, 1]]).double(), 2, 3, 0.5)])
def test_gamma_hat_is_newtons_matrix_of_the_covariance_times_gamma(gamma, rho, size, steps, share):
    gamma, x = torch.tensor(gamma).double(), maps_of(rho)
    network = nn.Sequential(norm_of(gamma), ce_of(len(gamma), num_iters=steps, group_size=size))
    growth = measure(GammaGrowth(network, {'0': '1'}), x[:2], x[2:])['1']
    sigma = torch.outer(gamma, gamma) * rho
    groups = [slice(i, i + size) for i in range(0, len(gamma), size)]
    expected = torch.cat([newton(sigma[g, g], steps) @ gamma[g] for g in groups])
    torch.testing.assert_close(growth.gamma_hat, expected, rtol=1e-9, atol=1e-9)
    assert growth.ratio == pytest.approx((expected.norm() / gamma.norm()).item())
    assert growth.ratio > 1 and growth.share == share


def test_feature_magnitude_is_the_norm_over_channels(ce_resnet18):
    network = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.5))
    x = torch.tensor([3., -4.]).view(1, 2, 1, 1).repeat(2, 1, 3, 5)
    ones = torch.ones(2, 3, 5, dtype=torch.float64)
    # Before the rectifier overwrites it; in evaluation, in which dropout does nothing.
    assert torch.equal(feature_magnitude(network, x.clone(), '0'), 5 * ones)
    assert torch.equal(feature_magnitude(network, x.clone(), '2'), 3 * ones)
    assert network.training
    with torch.no_grad():
        x = ce_resnet18.bn1(ce_resnet18.conv1(images(2)))
        for layer, y in (('bn1', x), ('ce1', ce_resnet18.ce1(x))):
            torch.testing.assert_close(feature_magnitude(ce_resnet18, images(2), layer),
                                       y.square().sum(1).sqrt(), **EXACT)
    first, second = (feature_magnitude(ce_resnet18, images(2), f'layer1.0.relu#{i}')
                     for i in (1, 2))
    assert first.shape == second.shape and not torch.allclose(first, second)


def test_correlation_of_a_norm_is_that_of_its_input():
    for offset, tolerance in ((0, 1e-12), (1e6, 1e-7)):  # large offsets cost no digits
        x = maps_of(RHO) + offset
        found = measure(ChannelCorrelations(nn.Sequential(norm_of([0.1, -2., 3.]))), x[:1], x[1:])
        assert list(found) == ['0'] and list(found['0']) == ['output']
        assert found['0']['output'].mean == pytest.approx((0.5 + 0.2 + 0.1) / 3, abs=tolerance)
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


def test_correlations_of_a_network_are_those_of_its_feature_maps(ce_resnet18, resnet):
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
    # norms are measured where there is no CE, or they are named
    plain = measure(ChannelCorrelations(resnet), images(2))
    assert len(plain) == 1 + 2 * 8 + 3 and list(plain)[:2] == ['bn1', 'layer1.0.bn1']
    both = measure(ChannelCorrelations(ce_resnet18, [r'layer2\.0\.(ce|bn2)']), images(2))
    assert list(both) == ['layer2.0.bn2', 'layer2.0.ce']
    assert both['layer2.0.bn2']['output'] == both['layer2.0.ce']['input']


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


def test_lambda_and_spectrum_of_each_layer():
    network = nn.Sequential(known_whitening(), ce_of(4, bd_ratio=0.0), ce_of(4, bd_ratio=0.25))
    network[0][1].lambda_logit.data.fill_(math.log(4))  # sigmoid(log 4) = 0.8
    assert lambdas(network) == pytest.approx({'0.1': 0.8, '1': 0, '2': 0.25})
    found = spectra(network)
    assert list(found) == ['0.1', '2'] and spectra(nn.ReLU()) == lambdas(nn.ReLU()) == {}
    root = math.sqrt(5) / 2, math.sqrt(0.25 + 4) / 2
    expected = [[2.5 - root[0], 2.5 + root[0]], [0.25 - root[1], 0.25 + root[1]]]
    torch.testing.assert_close(found['0.1'].eigenvalues, torch.tensor(expected).double())
    torch.testing.assert_close(found['0.1'].condition, torch.tensor(
        [expected[0][1] / expected[0][0], -expected[1][1] / expected[1][0]]).double())


def test_spread_of_the_weights_over_images():
    ce = ce_of(2)
    ce.reweighting = nn.Identity()  # the weights are the variances
    deviations = torch.tensor([1., 2., 3.]).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64) * deviations.view(-1, 1, 1, 1)
    x[:, 1] = x[0, 1]
    found = measure(ReweightingSpread(nn.Sequential(ce)), x[:1], x[1:])['0']
    variances = deviations.square()
    expected = (variances.std(correction=0) / variances.mean()).item()
    assert found.per_channel.tolist() == pytest.approx([expected, 0])
    assert found.mean == pytest.approx(expected / 2)


@pytest.mark.parametrize('collector', [ChannelMagnitudes, ChannelCorrelations, ReweightingSpread,
                                       GammaGrowth])
def test_batches_add_up_to_what_all_images_give(collector, ce_resnet18):
    """And the network computes what it did before."""
    pairs = {'bn1': 'ce1', 'layer4.1.bn2': 'layer4.1.ce'}
    arguments = [pairs] if collector is GammaGrowth else []
    x = images(5)
    before = ce_resnet18(x)[-1]
    parts, whole = (measure(collector(ce_resnet18, *arguments), *batches)
                    for batches in ((x[:1], x[1:]), (x, )))
    torch.testing.assert_close(as_plain(parts), as_plain(whole), **EXACT)
    torch.testing.assert_close(ce_resnet18(x)[-1], before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ce_resnet18.modules())


def as_plain(result):
    """Named tuples as lists, of which assert_close takes tensors and numbers."""
    if isinstance(result, dict):
        return {key: as_plain(value) for key, value in result.items()}
    return [as_plain(value) for value in result] if isinstance(result, tuple) else result


def test_mixed_precision_is_for_the_model_alone():
    network = nn.Sequential(ce_of(16)).float()  # CE leaves autocast by itself
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    exact = measure(ChannelCorrelations(network), x)['0']
    with torch.autocast('cpu', torch.bfloat16):
        assert measure(ChannelCorrelations(network), x)['0'] == exact


def test_stages():
    of = {'layer1': 'layer1.0.relu#2', 'stages.0': 'stages.0.1.act', 'features.3': 'features.3.bn',
          '3': '3', '12': '12.ce', 'stem': 'bn1', 'denseblock2': 'denseblock2.denselayer1.act'}
    assert {name: stage(layer) for name, layer in of.items()} == {name: name for name in of}
    assert {stage(name) for name in ('relu', 'ce1', 'bn1.ce', 'stem.4')} == {'stem'}


def vgg(ce):
    """The second of three rectifiers is silent, so what follows it is constant."""
    layers = []
    for channels in (3, 4, 4):
        layers += [nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    network = trained(nn.Sequential(*layers))
    network[4].weight.data.fill_(1e-3)
    for index, bias in ((1, 1), (4, -1), (7, 1)):
        network[index].bias.data.fill_(bias)
    return (insert_ce(network, '1|7', dict(bd_ratio=1.0)) if ce else network).double().eval()


def test_report_of_networks_of_layers_without_stages(tmp_path):
    networks = {'ce': vgg(True), 'bn': vgg(False)}
    models = measure_models(networks, dict.fromkeys(networks, images(1)),
                            lambda name: [images(2)], threshold=0.01)
    for model in models.values():
        assert model.inhibited == {'2': 0, '5': 1, '8': 0} and model.inhibited_total == 1 / 3
        assert model.small_gamma == {'1': 0, '4': 1, '7': 0}
    assert list(models['ce'].bd_ratio.items()) == [('1.ce', 1), ('7.ce', 1)]
    # where CE is in the other network; a constant has no correlation
    assert list(models['ce'].correlation['output']) == ['1.ce']
    assert list(models['bn'].correlation['output']) == ['1']
    figure, axes = plt.subplots()
    figures._by_depth(axes, {name: model.inhibited for name, model in models.items()})
    assert [label.get_text() for label in axes.get_xticklabels()] == ['2', '5', '8']
    assert axes.get_xticks().tolist() == axes.lines[1].get_xdata().tolist() == [0, 0.5, 1]
    figures._by_depth(axes, {'input': {'1.ce': None, '4.ce': 2.}})
    assert axes.lines[2].get_xydata().tolist() == [[1, 2]]
    plt.close(figure)


def test_magnitudes_of_images_of_any_number_of_channels(tmp_path):
    maps = {'ce': [np.ones((3, 4))] * 4, 'bn': [np.zeros((3, 4))] * 4}
    shown = [np.arange(48. * channels).reshape(channels, 6, 8) for channels in (1, 3, 4, 5)]
    assert figures.magnitudes(shown, maps, tmp_path / 'maps.png')
    assert plt.imread(tmp_path / 'maps.png')[..., :3].std() > 0


def living(*ce):
    """Its output is 1 where a channel lives, so the metric is their share."""
    return nn.Sequential(norm_of([1.] * 20), *ce)


def dead_channels(x):
    return (x == 0).flatten(2).all(-1).all(0)


def share_of_living(model):
    assert not model.training
    return (model(torch.ones(2, 20, 3, 3, dtype=torch.float64)) != 0).double().mean()


@pytest.mark.parametrize('model', [living(), living(ce_of(20, bd_ratio=1.0)), insert_ce(
    living(), '0', dict(bd_ratio=1.0)).double()])
def test_metrics_fall_with_the_share_of_zeroed_channels(model):
    for ce in model.modules():
        if isinstance(ce, CE):  # which would bring back channels that were zeroed in front of it
            ce.running_whitening.add_(1)
    model.train()
    model[0].eval()
    fractions = [0, 0.25, 0.5, 0.9, 1]
    curve = ablation_curve(model, share_of_living, '0', fractions, seeds=range(3))
    assert curve.shape == (3, 5) and curve.dtype == torch.float64
    torch.testing.assert_close(curve, (1 - torch.tensor(fractions).double()).expand(3, 5))
    assert model.training and not model[0].training
    assert share_of_living(model.eval()) == 1
    curves = ablation_curve(model, lambda m: {'a': 2, **({} if share_of_living(m) == 1 else dict(
        dead=1 - share_of_living(m)))}, '0', [0, 0.25], seeds=[0, 1])
    assert curves['a'].tolist() == [[2, 2]] * 2
    assert curves['dead'].nan_to_num(-1).tolist() == [[-1, 0.25]] * 2


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
        with zero_channels(model, '0', fraction, seed):
            return set(torch.nonzero(model(x)[0, :, 0, 0] == 0).flatten().tolist())

    model, x = living(), torch.ones(1, 20, 1, 1, dtype=torch.float64)
    assert dead(0.2, 7) < dead(0.4, 7) < dead(0.85, 7)
    assert [len(dead(f, 7)) for f in (0.2, 0.4, 0.85)] == [4, 8, 17]
    assert dead(0.4, 7) == dead(0.4, 7) != dead(0.4, 8)


def test_model_is_restored_after_exceptions(ce_resnet18):
    def interrupt(model):
        model(images(1))
        raise KeyboardInterrupt

    before = ce_resnet18(images(1))[-1]
    with pytest.raises(KeyboardInterrupt), ChannelMagnitudes(ce_resnet18):
        ablation_curve(ce_resnet18, interrupt, '.*', [0.5], [0])
    torch.testing.assert_close(ce_resnet18(images(1))[-1], before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ce_resnet18.modules())


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()


def with_ce():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), CE(4), nn.ReLU()).eval()


class Calls(nn.Module):
    """Calls its rectifier as often as it is told."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x, times=0):
        for _ in range(times):
            x = self.relu(x)
        return x


SMALL = torch.ones(2, 3, 4, 4)

ERRORS = {
    'pattern': (lambda: ChannelMagnitudes(plain(), ['2', 'relu']), "'relu' matches .* such as '2'"),
    'glob': (lambda: ChannelMagnitudes(plain(), '*relu'), "no regular expression .* '\\.\\*'"),
    'empty': (lambda: ChannelMagnitudes(plain(), []), 'layers is empty'),
    'no image': (lambda: measure(ChannelMagnitudes(plain())), 'no image was seen'),
    'empty batch': (lambda: measure(ChannelMagnitudes(plain()), SMALL[:0]), '2: .* none at all'),
    'one image': (lambda: measure(ReweightingSpread(with_ce()), SMALL[:1]), '2: 1 images'),
    'NaN': (lambda: measure(ChannelMagnitudes(plain()), SMALL * math.nan), '2: .* NaN'),
    'threshold': (lambda: measure(ChannelMagnitudes(plain()), SMALL, threshold=0.), 'threshold'),
    'training': (lambda: measure(ChannelCorrelations(with_ce().train()), SMALL),
                 r'2: .* call model\.eval\(\)'),
    'training, spread': (lambda: measure(ReweightingSpread(with_ce().train()), SMALL),
                         r'2: .* call model\.eval\(\)'),
    'pairs of another network': (lambda: gammas(plain(), {'1': 'ce'}), "pairs names '1' and 'ce'"),
    'no pairs': (lambda: GammaGrowth(plain(), {}), 'pairs holds no norm'),
    'inference mode': (torch.inference_mode()(lambda: ablation_curve(
        with_ce(), lambda model: model(SMALL).sum(), '1', [0.5], [0])), r'torch\.no_grad'),
    'run that does not run': (lambda: norm_ce_pairs(with_ce(), lambda: None), 'none of the 1 CE'),
    'no such layer': (lambda: feature_magnitude(plain(), SMALL, 'bn'), "no layer 'bn'.*'0'"),
    'layer not called': (lambda: feature_magnitude(Calls(), SMALL, 'relu'), 'no image was seen'),
    'fraction': (lambda: ablation_curve(plain(), len, '1', [1.5], [0]), r'fraction .* 1\.5'),
    'no seeds': (lambda: ablation_curve(plain(), len, '1', [0.5], []), 'at least one fraction'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors_name_the_thing_and_the_fix(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_passes_that_are_no_passes(resnet):
    with pytest.raises(ValueError, match='call the model itself'), ChannelMagnitudes(resnet) as m:
        resnet.layer1(torch.randn(1, 8, 8, 8).double())
        m.result()
    with pytest.raises(ValueError, match=r"called 2 times; .*'layer1\.0\.relu#1'"):
        feature_magnitude(resnet, images(1), 'layer1.0.relu')
    model = Calls()
    with ChannelMagnitudes(model) as measurement:
        model(SMALL, 2)
        with pytest.raises(ValueError, match=r'relu was called 1 times .* and 2 times'):
            model(SMALL, 1)
        with pytest.raises(ValueError, match='did not finish'):
            measurement.result()
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
    with ChannelMagnitudes(model) as measurement:
        with pytest.raises(RuntimeError):
            model(SMALL)
        with pytest.raises(ValueError, match='did not finish'):
            model(torch.ones(2, 4, 4, 4))


def test_importing_needs_torch_alone():
    code = ('import sys\n'
            'sys.modules.update(dict.fromkeys(("mmdet", "mmcv", "mmengine", "matplotlib")))\n'
            'import cenet_mmdet.analysis\n')
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
