"""Measurements of channels, on networks of which the answers are known."""
import contextlib
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from helpers.networks import SLIM, images, trained
from matplotlib import pyplot as plt
from mmdet.models.backbones import MobileNetV2, ResNet
from torch import nn
from torch.utils._pytree import tree_flatten

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
from cenet_mmdet.analysis.report import Report, measure_models
from cenet_mmdet.layers.reference import reference_ce
from cenet_mmdet.models.insert import NormCE
from cenet_mmdet.models.norm_layers import CEBN, CEGN

EXACT = dict(rtol=1e-10, atol=1e-10)
RHO = torch.tensor([[1, 0.5, -0.2], [0.5, 1, 0.1], [-0.2, 0.1, 1]], dtype=torch.float64)
IMAGES = images(4, 48, 48).double()


def evaluated(network):
    """A trained network in float64 and in evaluation."""
    trained(network).double().eval()
    return network.requires_grad_(False)


RESNET = evaluated(ResNet(18, **SLIM, zero_init_residual=False))
CE_RESNET = evaluated(CEResNet(18, **SLIM, ce_cfg=dict(group_size=4)))


def measure(collector, *batches, **options):
    with collector, torch.no_grad():
        for batch in batches:
            collector._model(batch)
    return collector.result(**options)


def seen_at(layer, network):
    """Input and output of the last call of a layer, before others change the output in place."""
    seen = []
    with layer.register_forward_hook(lambda _, args, out: seen.append((*args, out.clone()))):
        network(IMAGES)
    return seen[-1]


def norm_of(gamma):
    """A batch norm that is x -> gamma x, but for its eps, in evaluation."""
    norm = nn.BatchNorm2d(len(gamma), eps=1e-12).double().eval()
    norm.weight.data.copy_(torch.as_tensor(gamma))
    return norm


def ce_of(channels, **options):
    return CE(channels, **{'group_size': None, 'eps': 1e-12, **options}).double().eval()


def maps_of(covariance, samples=6, pixels=20):
    """Feature map (N, C, 4, L/4) whose covariance is exactly the one given, and mean not 0."""
    torch.manual_seed(2)
    white = torch.randn(samples * pixels, len(covariance), dtype=torch.float64)
    white, _ = torch.linalg.qr(white - white.mean(0))
    rows = math.sqrt(len(white)) * white @ torch.linalg.cholesky(covariance).T
    rows = rows + torch.arange(1, len(covariance) + 1)
    return rows.view(samples, 4, pixels // 4, -1).permute(0, 3, 1, 2).contiguous()


def test_inhibited_channels_are_those_of_small_magnitude():
    network = nn.Sequential(norm_of([0., -3., 0.009, 0.011, 2.]), nn.ReLU(inplace=True))
    x = torch.ones(2, 5, 3, 4).double()
    result = measure(ChannelMagnitudes(network), x, x[:1, :, 1:, 1:])
    assert result.magnitudes['1'].tolist() == pytest.approx([0, 0, 0.009, 0.011, 2])
    assert result.shares == {'1': 0.6}
    assert measure(ChannelMagnitudes(network), x, threshold=0.02).share == 0.8
    # the mean of absolute values over images and positions
    network = nn.Sequential(norm_of([1., -1.]), nn.LeakyReLU(0.1))
    x = torch.tensor([1., -2., 3., 0.]).double().view(1, 1, 2, 2).expand(1, 2, 2, 2)
    magnitudes = measure(ChannelMagnitudes(network), x).magnitudes
    assert magnitudes['1'].tolist() == pytest.approx([4.2 / 4, 2.4 / 4])
    # channels are counted rather than layers
    network = nn.Sequential(norm_of([0., 1.]), nn.ReLU(), nn.ConstantPad3d((0, 0, 0, 0, 0, 4), 1.),
                            nn.ELU())
    result = measure(ChannelMagnitudes(network), torch.ones(1, 2, 2, 2).double())
    assert result.shares == {'1': 0.5, '3': 1 / 6} and result.share == 2 / 8


def test_each_call_of_a_rectifier_is_a_layer():
    labels = [f'layer{stage}.{block}.relu#{call}'
              for stage in (1, 2, 3, 4) for block in (0, 1) for call in (1, 2)]
    for network in (RESNET, CE_RESNET):  # in the latter, F has rectifiers as well
        block = network.layer1[0]
        x, second = seen_at(block, network)
        first = block.bn1(block.conv1(x)).relu()
        found = measure(ChannelMagnitudes(network), IMAGES).magnitudes
        assert list(found) == ['relu', *labels]
        for label, x in ((labels[0], first), (labels[1], second)):
            torch.testing.assert_close(found[label], x.mean((0, 2, 3)), **EXACT)
    chosen = measure(ChannelMagnitudes(RESNET, [r'layer[12]\.1\.relu', 'relu']), IMAGES)
    assert list(chosen.magnitudes) == ['relu', 'layer1.1.relu#1', 'layer1.1.relu#2',
                                       'layer2.1.relu#1', 'layer2.1.relu#2']
    found = measure(ChannelMagnitudes(evaluated(MobileNetV2(widen_factor=0.25))), IMAGES)
    assert len(found.magnitudes) == 1 + 1 + 2 * 16 + 1
    assert found.magnitudes['layer2.0.expand_conv.activate'].shape == (48, )  # 6 * 8


def test_gamma_w_and_lambda_are_those_of_the_layers():
    network = nn.Sequential(norm_of([1., -2., 0.001, 4.]), ce_of(4, group_size=2),
                            nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 4),
                            ce_of(4, bd_ratio=0.0), ce_of(4, bd_ratio=0.25))
    network[1].running_whitening.copy_(torch.tensor([[[2., 1.], [1., 3.]], [[0., -1.], [-1., .5]]]))
    network[1].lambda_logit.data.fill_(math.log(4))  # sigmoid(log 4) = 0.8
    assert lambdas(network) == pytest.approx({'1': 0.8, '4': 0, '5': 0.25})
    found = gammas(network, pairs={'0': '1'})
    assert list(found) == ['0', '3']
    assert found['0'].magnitude.tolist() == pytest.approx([1, 2, 0.001, 4])
    assert found['0'].effective.tolist() == pytest.approx([0, 5, 4, 1.999])
    assert found['0'].share == found['0'].effective_share == 0.25
    assert found['3'].effective is None and found['3'].effective_share is None
    assert gammas(network, threshold=3)['0'].share == 0.75
    assert gammas(network)['0'].effective is None
    found = spectra(network)
    assert list(found) == ['1', '5']
    root = math.sqrt(5) / 2, math.sqrt(0.25 + 4) / 2
    low, high, negative, positive = 2.5 - root[0], 2.5 + root[0], 0.25 - root[1], 0.25 + root[1]
    assert found['1'].eigenvalues.tolist() == [pytest.approx([low, high]),
                                               pytest.approx([negative, positive])]
    assert found['1'].condition.tolist() == pytest.approx([high / low, -positive / negative])


PLUGINS = [dict(cfg=dict(type='CE', group_size=4, postfix=i), position=f'after_conv{i}',
                stages=(True, False, False, False)) for i in (1, 2, 3)]
BLOCKS = {f'layer{stage}.{i}.bn2': f'layer{stage}.{i}.ce' for stage in range(1, 5) for i in (0, 1)}
PAIRS = {
    'ResNet': (lambda: ResNet(18, **SLIM), {}),
    'CE-ResNet-18': (lambda: CEResNet(18, **SLIM), {'bn1': 'ce1', **BLOCKS}),
    # After the first two convolutions, MMDetection calls plugins behind the rectifier.
    'plugins': (lambda: ResNet(50, **SLIM, plugins=PLUGINS),
                {f'layer1.{i}.bn3': f'layer1.{i}.ce3' for i in range(3)}),
    'norm_cfg': (lambda: nn.Sequential(CEGN(3, num_groups=1), nn.ReLU(), CEBN(3)),
                 {'0': '0.ce', '2': '2.ce'}),
    'CE first': (lambda: nn.Sequential(NormCE(nn.BatchNorm2d(3), CE(3), before=True)), {}),
}


@pytest.mark.parametrize('name', PAIRS)
def test_pairs_of_norm_and_ce_are_seen_at_run_time(name):
    make, expected = PAIRS[name]
    network = make()
    network.train()
    next(network.children()).eval()
    assert norm_ce_pairs(network, lambda: network(images(2, 32, 32))) == expected
    assert network.training and not next(network.children()).training
    assert not any(x.any() for name, x in network.named_buffers() if 'num_batches' in name)


@pytest.mark.parametrize(('gamma', 'rho', 'size', 'steps', 'share'), [
    ([0.3, -2., 1.], RHO, 3, 1, 1),  # for one step, part (1) is a theorem
    ([0.3, -2., 1., 1., -0.2, 3.], torch.block_diag(RHO, RHO) * 0.9 + 0.1, 3, 3, 1),
    # the small channel is turned around by the large one beside it
    ([1., 0.3], torch.tensor([[1, 0.9], [0.9, 1]]).double(), 2, 3, 0.5)])
def test_gamma_hat_is_newtons_matrix_of_the_covariance_times_gamma(gamma, rho, size, steps, share):
    gamma, x = torch.tensor(gamma).double(), maps_of(rho)
    network = nn.Sequential(norm_of(gamma), ce_of(len(gamma), num_iters=steps, group_size=size))
    growth = measure(GammaGrowth(network, {'0': '1'}), x[:2], x[2:])['1']
    network[1].train()
    whitening = reference_ce(network[1], [network[0](x)])[1]['whitening']
    expected = (whitening @ gamma.view(-1, size, 1)).flatten()
    torch.testing.assert_close(growth.gamma_hat, expected, rtol=1e-9, atol=1e-9)
    assert growth.ratio == pytest.approx((expected.norm() / gamma.norm()).item())
    assert growth.ratio > 1 and growth.share == share


def test_feature_magnitude_is_the_norm_over_channels():
    network = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.5))
    x = torch.tensor([3., -4.]).view(1, 2, 1, 1).repeat(2, 1, 3, 5)
    # Before the rectifier overwrites it; in evaluation, in which dropout does nothing.
    for layer, expected in (('0', 5), ('2', 3)):
        assert feature_magnitude(network, x.clone(), layer).tolist() == [[[expected] * 5] * 3] * 2
    assert network.training
    x = CE_RESNET.bn1(CE_RESNET.conv1(IMAGES))
    for layer, y in (('bn1', x), ('ce1', CE_RESNET.ce1(x))):
        torch.testing.assert_close(feature_magnitude(CE_RESNET, IMAGES, layer),
                                   y.square().sum(1).sqrt(), **EXACT)
    assert not torch.allclose(*(feature_magnitude(CE_RESNET, IMAGES, f'layer1.0.relu#{call}')
                                for call in (1, 2)))


@pytest.mark.parametrize('ratio', [0.0, None, 1.0])
def test_correlations_in_ce_are_those_of_its_feature_maps(ratio):
    network = evaluated(CEResNet(18, **SLIM, ce_cfg=dict(group_size=4, bd_ratio=ratio)))
    ce = network.layer3[1].ce
    found = measure(ChannelCorrelations(network), IMAGES)
    assert list(found)[:2] == ['ce1', 'layer1.0.ce'] and len(found) == 9  # in the order of calls
    x, output = seen_at(ce, network)
    expected = {'input': x}
    if ce.has_bd:
        expected['bd'] = (ce.running_whitening @ x.unflatten(1, (-1, 4)).flatten(3)).view(x.shape)
    if ce.has_ir:
        expected['ir'] = ce.reweighting(x.var((2, 3)))[..., None, None] * x / ce.running_scale
    expected['output'] = output
    assert list(found['layer3.1.ce']) == list(expected)
    for point, y in expected.items():
        pairs = y.transpose(0, 1).flatten(1).corrcoef().abs()[~torch.eye(32, dtype=torch.bool)]
        assert found['layer3.1.ce'][point].mean == pytest.approx(pairs.mean().item(), abs=1e-10)


def test_norms_are_measured_where_there_is_no_ce_or_they_are_named():
    found = measure(ChannelCorrelations(RESNET), IMAGES)
    assert len(found) == 1 + 2 * 8 + 3 and list(found)[:2] == ['bn1', 'layer1.0.bn1']
    both = measure(ChannelCorrelations(CE_RESNET, [r'layer2\.0\.(ce|bn2)']), IMAGES)
    assert list(both) == ['layer2.0.bn2', 'layer2.0.ce']
    assert both['layer2.0.bn2']['output'] == both['layer2.0.ce']['input']


@pytest.mark.parametrize(('dtype', 'offset', 'tolerance'), [
    (torch.float32, 0, 1e-5), (torch.float64, 0, 1e-12), (torch.float64, 1e6, 1e-7)])
def test_correlations_are_those_of_channels_that_vary(dtype, offset, tolerance):
    network = nn.Sequential(norm_of([0.1, -2., 3., 1., 1.]), ce_of(5, bd_ratio=1.0)).to(dtype)
    x = maps_of(RHO) + offset
    # The mean of many 2.9 is not 2.9; their deviation is not 0, but within rounding.
    x = torch.cat([x, torch.full_like(x[:, :1], 2.9), torch.zeros_like(x[:, :1])], 1).to(dtype)
    found = measure(ChannelCorrelations(network, '.*'), x[:1], x[1:])
    assert list(found['0']) == ['output'] and list(found['1']) == ['input', 'bd', 'output']
    for correlation in (found['0']['output'], *found['1'].values()):
        assert correlation.mean == pytest.approx((0.5 + 0.2 + 0.1) / 3, abs=tolerance)
        assert correlation[1:] == (3, 2)
    x[:, 1:] = 0
    alone = measure(ChannelCorrelations(network), x)['1']['output']
    assert math.isnan(alone.mean) and alone[1:] == (1, 4)


def test_spread_of_the_weights_over_images():
    ce = ce_of(2)
    ce.reweighting = nn.Identity()  # the weights are the variances
    variances = torch.tensor([1., 4., 9.]).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64) * variances.sqrt().view(-1, 1, 1, 1)
    x[:, 1] = x[0, 1]
    found = measure(ReweightingSpread(nn.Sequential(ce)), x[:1], x[1:])['0']
    expected = (variances.std(correction=0) / variances.mean()).item()
    assert found.per_channel.tolist() == pytest.approx([expected, 0])
    assert found.mean == pytest.approx(expected / 2)


@pytest.mark.parametrize('collector', [ChannelMagnitudes, ChannelCorrelations, ReweightingSpread,
                                       lambda network: GammaGrowth(network, BLOCKS)])
def test_batches_add_up_to_what_all_images_give(collector):
    parts, whole = (measure(collector(CE_RESNET), *batches)
                    for batches in ((IMAGES[:1], IMAGES[1:]), (IMAGES, )))
    torch.testing.assert_close(tree_flatten(parts)[0], tree_flatten(whole)[0], **EXACT)


def test_mixed_precision_is_for_the_model_alone():
    network = nn.Sequential(ce_of(16)).float()  # CE leaves autocast by itself
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    exact = measure(ChannelCorrelations(network), x)['0']
    with torch.autocast('cpu', torch.bfloat16):
        assert measure(ChannelCorrelations(network), x)['0'] == exact


def test_stages():
    of = {'layer1.0.relu#2': 'layer1', 'stages.0.1.act': 'stages.0', 'features.3.bn': 'features.3',
          '3': '3', '12.ce': '12', 'denseblock2.denselayer1.act': 'denseblock2', 'bn1': 'stem',
          'relu': 'stem', 'ce1': 'stem', 'bn1.ce': 'stem', 'stem.4': 'stem'}
    assert {layer: stage(layer) for layer in of} == of


def vgg(ce):
    """The second of three rectifiers is silent, so what follows it is constant."""
    layers = []
    for channels, bias in ((3, 1), (4, -1), (4, 1)):
        norm = nn.BatchNorm2d(4)
        nn.init.constant_(norm.weight, 1 if bias > 0 else 1e-3)
        nn.init.constant_(norm.bias, bias)
        layers += [nn.Conv2d(channels, 4, 1, bias=False), norm, nn.ReLU()]
    network = nn.Sequential(*layers)
    return (insert_ce(network, '1|7', dict(bd_ratio=1.0)) if ce else network).double().eval()


def test_report_of_networks_of_layers_without_stages(monkeypatch):
    networks = {'ce': vgg(True), 'bn': vgg(False)}
    models = measure_models(networks, dict.fromkeys(networks, IMAGES),
                            lambda name: [IMAGES], threshold=0.01)
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
    models['bn'].ablation = dict(fractions=[0, 0.5], curves={'bbox_mAP': [[1, 0.4], [1, 0]],
                                                             'coco/segm_mAP': [[1, 0.2], [1, 0]]})
    monkeypatch.setattr(figures, '_save', lambda figure, path: figure)
    axes, = figures.ablation(Report(4, 0.01, models), None).axes
    assert axes.get_ylabel() == 'coco/segm_mAP' and axes.lines[0].get_ydata()[1] == 0.1


def test_magnitudes_of_images_of_any_number_of_channels(tmp_path):
    maps = {'ce': [np.ones((3, 4))] * 4, 'bn': [np.zeros((2, 4))] * 4}
    shown = [np.arange(48. * channels).reshape(channels, 6, 8) for channels in (1, 3, 4, 5)]
    assert figures.magnitudes(shown, maps, tmp_path / 'maps.png')
    assert plt.imread(tmp_path / 'maps.png')[..., :3].std() > 0


def living(*ce):
    """Its output is 1 where a channel lives, so the metric is their share."""
    return nn.Sequential(norm_of([1.] * 20), *ce)


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
    assert curve.dtype == torch.float64
    assert curve.tolist() == [pytest.approx([1 - fraction for fraction in fractions])] * 3
    assert model.training and not model[0].training
    assert share_of_living(model.eval()) == 1
    curves = ablation_curve(model, lambda m: {'a': 2, **({} if share_of_living(m) == 1 else dict(
        dead=1 - share_of_living(m)))}, '0', [0, 0.25], seeds=[0, 1])
    assert curves['a'].tolist() == [[2, 2]] * 2
    assert curves['dead'].nan_to_num(-1).tolist() == [[-1, 0.25]] * 2


def test_living_channels_of_ce_see_the_whole_input():
    ce = CE_RESNET.layer1[0].ce
    _, whole = seen_at(ce, CE_RESNET)
    with zero_channels(CE_RESNET, r'layer1\.0\.bn2', 0.5, seed=0):
        _, zeroed = seen_at(ce, CE_RESNET)
    dead = (zeroed == 0).flatten(2).all(-1).all(0)
    assert dead.sum() == 4
    torch.testing.assert_close(zeroed[:, ~dead], whole[:, ~dead], **EXACT)


def test_channels_of_a_fraction_are_among_those_of_a_larger_one():
    def dead(fraction, seed):
        with zero_channels(model, '0', fraction, seed):
            return set(torch.nonzero(model(x)[0, :, 0, 0] == 0).flatten().tolist())

    model, x = living(), torch.ones(1, 20, 1, 1, dtype=torch.float64)
    assert dead(0.2, 7) < dead(0.4, 7) < dead(0.85, 7)
    assert [len(dead(f, 7)) for f in (0.2, 0.4, 0.85)] == [4, 8, 17]
    assert dead(0.4, 7) == dead(0.4, 7) != dead(0.4, 8)


def test_model_is_restored_after_measurements_and_exceptions():
    before = CE_RESNET(IMAGES)[-1]
    collectors = (ChannelMagnitudes(CE_RESNET), ChannelCorrelations(CE_RESNET),
                  ReweightingSpread(CE_RESNET), GammaGrowth(CE_RESNET, BLOCKS))
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:
        for collector in collectors:
            stack.enter_context(collector)
        norm_ce_pairs(CE_RESNET, lambda: CE_RESNET(IMAGES))
        torch.testing.assert_close(CE_RESNET(IMAGES)[-1], before, **EXACT)
        ablation_curve(CE_RESNET, lambda model: model(IMAGES)[-1].sum() + 1 // 0, '.*', [.5], [0])
    assert torch.equal(CE_RESNET(IMAGES)[-1], before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in CE_RESNET.modules())


def plain(ce=()):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *ce, nn.ReLU()).eval()


ONES = torch.ones(2, 3, 4, 4)
ERRORS = {
    'pattern': (lambda: ChannelMagnitudes(plain(), ['2', 'relu']), "'relu' matches .* such as '2'"),
    'glob': (lambda: ChannelMagnitudes(plain(), '*relu'), "no regular expression .* '\\.\\*'"),
    'no image': (lambda: measure(ChannelMagnitudes(plain())), 'no image was seen'),
    'NaN': (lambda: measure(ChannelMagnitudes(plain()), ONES * math.nan), '2: .* NaN'),
    'threshold': (lambda: measure(ChannelMagnitudes(plain()), ONES, threshold=0.), 'threshold'),
    'eval': (lambda: measure(ChannelCorrelations(plain([CE(4)]).train()), ONES), r'2: .*\.eval\('),
    'spread': (lambda: measure(ReweightingSpread(plain([CE(4)]).train()), ONES), '2: .* training'),
    'inference mode': (torch.inference_mode()(lambda: ablation_curve(
        plain([CE(4)]), lambda model: model(ONES).sum(), '1', [0.5], [0])), r'torch\.no_grad'),
    'no such layer': (lambda: feature_magnitude(plain(), ONES, 'bn'), "no layer; .*'0'"),
    'call': (lambda: feature_magnitude(ResNet(18), ONES, 'layer1.0.relu'), 'calls .*relu#1'),
    'no feature map': (lambda: feature_magnitude(ResNet(18), ONES, ''), 'no feature map'),
    'fraction': (lambda: ablation_curve(plain(), len, '1', [1.5], [0]), r'fraction .* 1\.5'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors_name_the_thing_and_the_fix(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_calls_outside_of_a_pass_of_the_model_do_not_count():
    with ChannelMagnitudes(RESNET, 'layer1.0.relu') as measurement:
        RESNET(IMAGES)
        expected = measurement.result().magnitudes
        RESNET.layer1(torch.randn(1, 8, 8, 8).double())
        torch.testing.assert_close(measurement.result().magnitudes, expected, rtol=0, atol=0)


def test_networks_without_ce_have_none_of_its_measurements():
    assert spectra(plain()) == lambdas(plain()) == {}
    for collector in (GammaGrowth(plain(), {}), ReweightingSpread(plain())):
        assert measure(collector, ONES) == {}
    assert measure(ReweightingSpread(plain([CE(4)])), ONES[:1]) == {}  # one image has no spread


def test_importing_needs_torch_alone():
    run(sys.executable, '-c', 'import sys\n'
        'sys.modules.update(dict.fromkeys(("mmdet", "mmcv", "mmengine", "matplotlib")))\n'
        'import cenet_mmdet.analysis', cwd=ROOT)
