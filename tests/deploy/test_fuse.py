"""Folding for inference: what the model computed before, on every kind of network."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import HALF, ROOT
from helpers.layers import strengthened
from helpers.networks import SLIM
from helpers.norms import BatchNormAct2d
from mmcv.cnn import ConvModule
from mmdet.models.backbones import ResNet
from torch import nn

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.deploy import CEConv2d, fuse_ce
from cenet_mmdet.deploy.export import DensePart, export_onnx
from cenet_mmdet.models.backbones import CEMobileNetV2
from cenet_mmdet.models.build import build_model
from cenet_mmdet.models.insert import NormCE
from cenet_mmdet.models.norm_layers import CEBN, CEGN
from cenet_mmdet.utils.compat import CAN_EXPORT
from cenet_mmdet.utils.errors import InputError

PLUGIN = [dict(cfg=dict(type='CE', group_size=4), stages=(True, True, False, True),
               position='after_conv3')]


def sequential():
    return insert_ce(nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4)), '.*',
        dict(group_size=4))


def conv_modules():
    return insert_ce(nn.Sequential(*(
        ConvModule(c, d, k, norm_cfg=dict(type='BN'), groups=g, padding=k // 2)
        for c, d, k, g in ((3, 8, 3, 1), (8, 8, 3, 8), (8, 16, 1, 1)))), '.*')


NETWORKS = {
    'CE-ResNet-18': lambda: CEResNet(18, **SLIM),
    'CE-ResNet-50': lambda: CEResNet(50, **SLIM),
    'behind the second norm': lambda: CEResNet(50, **SLIM, ce_position='second'),
    'SyncCE': lambda: CEResNet(50, **SLIM, ce_cfg=dict(type='SyncCE')),
    'plugins, identity start': lambda: ResNet(50, **SLIM, plugins=[
        {**PLUGIN[0], 'cfg': dict(type='CE', identity_start=True)}]),
    'insert_ce in ResNet-50': lambda: insert_ce(ResNet(50, **SLIM), r'layer[12]\.\d+\.bn3'),
    'insert_ce, Sequential': sequential,
    'insert_ce, ConvModule': conv_modules,
    'CE-MobileNetV2': lambda: CEMobileNetV2(widen_factor=0.25),
}


def images(*size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*size, generator=generator, dtype=dtype) + 5


@torch.no_grad()
def trained(network, dtype=torch.float64):
    """With statistics, inhibited channels and offsets that no initial network has."""
    torch.manual_seed(0)
    model = strengthened(network()).to(dtype)
    model.train()  # that of MMDetection's ResNet returns nothing
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.2, 1)
            nn.init.normal_(norm.bias, std=3)
            norm.weight[::4] = 1e-3
    for step in range(3):
        model(images(4, 3, 64, 96, seed=step, dtype=dtype))
    model.eval()
    return model


@torch.no_grad()
def outputs(model, x):
    y = model(x)
    return list(y) if isinstance(y, (tuple, list)) else [y]


def deviation(ours, expected):
    """Largest difference, relative to the output's largest value."""
    assert len(ours) == len(expected)
    return max(float((a.double() - b.double()).abs().max() / b.abs().max())
               for a, b in zip(ours, expected))


def fused(model, dtype=torch.float64):
    """A folded copy."""
    return fuse_ce(copy.deepcopy(model).to(dtype), images(2, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize('network', NETWORKS.values(), ids=NETWORKS)
def test_computes_what_the_model_did(network):
    """Large and small maps, to 1e-12 in float64 and 1e-4 in float32; no norm is left."""
    model = trained(network)
    folded, single = fused(model), fused(model, torch.float32)
    for size in ((2, 3, 64, 96), (1, 3, 224, 160), (3, 3, 32, 32)):
        x = images(*size, seed=9)
        expected = outputs(model, x)
        assert deviation(outputs(folded, x), expected) < 1e-12
        assert deviation(outputs(single, x.float()), expected) < 1e-4
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(('size', 'without_x'), [((64, 64), True), ((3, 3), False)])
def test_large_maps_are_computed_without_ces_input(size, without_x, monkeypatch):
    calls = []
    original = CEConv2d._without_x
    monkeypatch.setattr(CEConv2d, '_without_x',
                        lambda self, u: (calls.append(u.shape), original(self, u))[1])
    model = trained(sequential)
    x = images(2, 3, *size)
    folded = fused(model)
    calls.clear()
    assert deviation(outputs(folded, x), outputs(model, x)) < 1e-12
    # the convolutions from 3 and from 12 channels, not the 3x3 one
    assert [shape[1] for shape in calls] == ([3, 12] if without_x else [3])


def test_sizes_without_variance_or_images():
    model = trained(sequential)
    folded = fused(model)
    for size in ((2, 3, 1, 1), (0, 3, 8, 8), (1, 3, 2, 1)):
        torch.testing.assert_close(outputs(folded, images(*size)), outputs(model, images(*size)))


@pytest.mark.filterwarnings('error')  # a copy to NCHW warns
def test_channels_last_stays_so_without_a_copy():
    """Where the convolution is 1x1 and the map large."""
    model = fused(trained(lambda: insert_ce(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)), '.*')))
    x = images(2, 3, 8, 8)
    ours, = outputs(model, x.contiguous(memory_format=torch.channels_last))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, *outputs(model, x))


@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_half_precision(dtype):
    """As good as the unfolded model in the same type, with statistics in float32."""
    model, x = trained(NETWORKS['CE-ResNet-50']), images(2, 3, 96, 96, seed=9)
    expected, folded = outputs(model, x), fused(model).to(dtype)
    ours, unfolded = (outputs(m.to(dtype), x.to(dtype)) for m in (folded, model))
    assert all(y.dtype == dtype for y in ours)
    assert deviation(ours, expected) < 2 * deviation(unfolded, expected)


class Block(nn.Module):
    """Layers that a function calls; one that none calls."""

    def __init__(self, forward, **ce_cfg):
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.ce, self.unused = CE(3, **ce_cfg), CE(3)
        self.tail = nn.Sequential(nn.ReLU())
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


@pytest.mark.parametrize(('forward', 'kinds'), [
    (lambda m, x: m.ce(m.bn(m.conv(m.ce(m.bn(m.conv(x)))))), dict(conv=CEConv2d, bn=nn.Identity)),
    # What the convolution returns goes elsewhere too, is changed, or is returned.
    (lambda m, x: [z := m.conv(x), z + m.ce(m.bn(z))][1], dict(conv=nn.Conv2d, bn=NormCE)),
    (lambda m, x: m.ce(m.bn(m.conv(x).relu_())), dict(conv=nn.Conv2d, bn=NormCE)),
    (lambda m, x: [z := m.conv(x), m.ce(m.bn(z))], dict(conv=nn.Conv2d, bn=NormCE)),
    (lambda m, x: m.bn(m.conv(x)) + m.conv(x), dict(conv=nn.Conv2d, bn=nn.BatchNorm2d)),
    (lambda m, x: m.ce(m.bn(m.conv(x))) + m.bn2(m.conv(x)), dict(bn=NormCE, bn2=nn.BatchNorm2d))])
def test_folds_only_what_nothing_else_reads(forward, kinds):
    model = trained(lambda: Block(forward))
    folded = fused(model)
    x = images(2, 3, 5, 6)
    assert deviation(outputs(folded, x), outputs(model, x)) < 1e-12
    for name, kind in dict(kinds, unused=CE).items():
        assert type(folded.get_submodule(name)) is kind


def test_layers_with_hooks_stay():
    model = trained(sequential)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append('conv'))
    model[1].ce.register_forward_hook(lambda *_: calls.append('ce'))
    folded = fused(model)
    calls.clear()
    outputs(folded, images(1, 3, 4, 4))
    assert calls == ['conv', 'ce']


def snapshot(model):
    """All attributes of all modules: which objects they are, and the values of tensors."""
    attributes = {name: {key: {k: id(v) for k, v in value.items()} if isinstance(value, dict)
                         else id(value) for key, value in vars(module).items()}
                  for name, module in model.named_modules()}
    return attributes, {key: value.clone() for key, value in model.state_dict().items()}


def conv_then(*layers):
    return nn.Sequential(nn.Conv2d(3, 8, 1), *layers)


def weights_read(m, x):
    return m.ce(m.bn(m.conv(x))) + m.tail(F.conv2d(x, m.conv.weight))


REFUSED = {
    'training': (sequential, lambda m: m.train(), 'the model is in training mode'),
    'CE in training': (sequential, lambda m: m[1].ce.train(),
                       r': 1\.ce \(it or its norm is in training mode'),
    'norm in training': (sequential, lambda m: m[4].norm.train(), r': 4\.ce \('),
    'unset': (sequential, lambda m: [m[i].ce.reset_running_stats() for i in (1, 6)],
              r': 1\.ce, 6\.ce \(its statistics were never trained or loaded'),
    'half precision': (sequential, lambda m: m.bfloat16(), 'float32 or float64'),
    'group norm': (lambda: conv_then(CEGN(8, num_groups=2)), None,
                   r'1\.ce \(its norm is a GroupNorm; only batch norms'),
    'CE before its norm': (lambda: insert_ce(conv_then(nn.BatchNorm2d(8)), '1', before=True), None,
                           r'1\.ce \(its input is not the output of one norm'),
    'behind ReLU': (lambda: conv_then(nn.BatchNorm2d(8), nn.ReLU(), CE(8)), None,
                    r'3 \(its input is not the output of one norm'),
    'behind ReLU in place': (lambda: conv_then(nn.BatchNorm2d(8), nn.ReLU(True), CE(8)), None,
                             r'3 \(something else reads or changes the output of its norm'),
    'behind activation': (lambda: conv_then(BatchNormAct2d(8), CE(8)), None,
                          r'2 \(something else reads or changes the output of its norm'),
    'norm read elsewhere': (lambda: Block(lambda m, x: [y := m.bn(x), y + m.ce(y)][1]), None,
                            r'ce \(something else reads or changes the output of its norm'),
    'two norms': (lambda: Block(lambda m, x: m.ce(m.bn(x)) + m.ce(m.bn2(x))), None,
                  r'ce \(its input is not the output of one norm'),
    'plugins': (lambda: ResNet(50, **SLIM, plugins=[{**PLUGIN[0], 'position': 'after_conv2'}]),
                None, r': layer1\.0\.ce'),
    'weights read': (lambda: Block(weights_read, bd_ratio=1.), None,
                     r'first output that differs is that of tail\.0, by'),
    'no weights': (lambda: Block(weights_read), None, "does not run .* no attribute 'weight'"),
    'random': (lambda: conv_then(CEBN(8), nn.Dropout()), lambda m: m[2].train(),
               'the first output that differs is that of 2,'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(case):
    make, change, message = REFUSED[case]
    model = trained(make)
    if change is not None:
        change(model)
    before, values = snapshot(model)
    with pytest.raises(InputError, match=message):
        fuse_ce(model, images(2, 3, 32, 32, dtype=next(model.parameters()).dtype))
    after, state = snapshot(model)
    assert after == before
    assert all(torch.equal(state[key], value) for key, value in values.items())


def test_a_folded_model_cannot_be_trained():
    with pytest.raises(RuntimeError, match='folded for inference'):
        fused(trained(sequential)).train()


@pytest.mark.parametrize('example', [
    (images(2, 3, 8, 8), images(2, 3, 9, 9)), dict(x=images(2, 3, 8, 8)), (images(2, 3, 8, 8), )])
def test_examples_of_several_arguments(example):
    """Used as copies: this model changes its first argument."""
    class Model(nn.Sequential):

        def forward(self, x, y=None):
            x -= 5
            return {'x': self[0](x), 'rest': [] if y is None else [self[0](y)]}

    model = fuse_ce(trained(lambda: Model(sequential())), example)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    values = list(example.values()) if isinstance(example, dict) else example
    torch.testing.assert_close(values[0], images(2, 3, 8, 8))


@pytest.mark.long
@pytest.mark.skipif(not CAN_EXPORT, reason='needs torch 2.7')
def test_compiles_and_exports_without_graph_breaks():
    folded = fused(trained(NETWORKS['CE-ResNet-50'], torch.float32), torch.float32)
    x = images(1, 3, 96, 64, dtype=torch.float32)
    compiled = torch.compile(folded, backend='aot_eager', fullgraph=True)
    assert deviation(outputs(compiled, x), outputs(folded, x)) < 1e-5
    height, width = (32 * torch.export.Dim(name, min=2, max=64) for name in 'hw')
    program = torch.export.export(folded, (x, ), dynamic_shapes={'x': {2: height, 3: width}})
    for size in ((64, 96), (224, 160)):
        x = images(1, 3, *size, dtype=torch.float32)
        assert deviation(outputs(program.module(), x), outputs(folded, x)) < 1e-5


def test_deploy_tool_exports_a_detector(tool_here, tmp_path):
    """Folded, exported, run in onnxruntime on three sizes; two stages of a CE-ResNet-18."""
    (tmp_path / 'slim.py').write_text(f'''
_base_ = {str(ROOT / 'configs/demo/mask_rcnn_ce_r18_shapes.py')!r}
model = dict(
    backbone=dict(base_channels=8, stem_channels=8, num_stages=2, strides=(1, 2),
                  dilations=(1, 1), out_indices=(0, 1)),
    neck=dict(in_channels=[8, 16], num_outs=3),
    rpn_head=dict(anchor_generator=dict(strides=[4, 8, 16])))
''')
    model = build_model(tmp_path / 'slim.py')

    def deploy():
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_1.pth')
        return tool_here('deploy.py', 'slim.py', 'epoch_1.pth', '--onnx', 'dense.onnx', '--size',
                         96, 128, cwd=tmp_path)

    failed = deploy()
    assert failed.returncode == 1
    assert 'statistics were never trained or loaded' in failed.stderr
    assert not list(tmp_path.glob('*.onnx*'))
    model.train()
    model.backbone(images(2, 3, 64, 64, dtype=torch.float32))
    result = deploy()
    if not CAN_EXPORT:
        assert result.returncode == 1
        assert 'ONNX export needs torch 2.7 or newer' in result.stderr
        assert not list(tmp_path.glob('*onnx*'))
        return
    assert '5 CE layers folded' in result.stdout
    errors = [float(e) for e in re.findall(r'onnxruntime at .*: within (\S+)', result.stdout)]
    assert len(errors) == 3
    assert max(errors) < 1e-3
    assert [p.name for p in tmp_path.glob('*onnx*')] == ['dense.onnx']


def test_export_refuses_odd_sizes(tmp_path):
    model = trained(NETWORKS['CE-ResNet-18'], torch.float32)
    with pytest.raises(ValueError, match='multiples of 32, got 65 x 64'):
        export_onnx(model, tmp_path / 'x.onnx', torch.zeros(1, 3, 65, 64))
    assert len(DensePart(model)(torch.zeros(1, 3, 64, 64))) == 4
