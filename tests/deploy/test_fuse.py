"""Folding for inference: what the model computed before, on every kind of network."""
import copy
import re
import sys
import warnings

import pytest
import torch
from conftest import HALF, ROOT, tool
from mmcv.cnn import ConvModule
from mmdet.models.backbones import ResNet
from torch import nn

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.deploy import CEConv2d, fuse_ce
from cenet_mmdet.deploy.export import DensePart, export_onnx
from cenet_mmdet.models.backbones import CEMobileNetV2
from cenet_mmdet.models.norm_layers import CEGN
from cenet_mmdet.utils.compat import CAN_EXPORT

SLIM = dict(base_channels=8, stem_channels=8)
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
    'BD alone': lambda: CEResNet(50, **SLIM, ce_cfg=dict(bd_ratio=1.0)),
    'IR alone': lambda: CEResNet(50, **SLIM, ce_cfg=dict(bd_ratio=0.0)),
    'fixed lambda': lambda: CEResNet(50, **SLIM, ce_cfg=dict(bd_ratio=0.3)),
    'plugins of ResNet-50': lambda: ResNet(50, **SLIM, plugins=PLUGIN),
    'insert_ce in ResNet-50': lambda: insert_ce(ResNet(50, **SLIM), r'layer[12]\.\d+\.bn3'),
    'insert_ce, Sequential': sequential,
    'insert_ce, ConvModule': conv_modules,
    'CE-MobileNetV2': lambda: CEMobileNetV2(widen_factor=0.25),
}


def images(*size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*size, generator=generator, dtype=dtype) + 5


def trained(network, dtype=torch.float64):
    """With statistics, inhibited channels and offsets that no initial network has."""
    torch.manual_seed(0)
    model = network().to(dtype)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.2, 1)
            nn.init.normal_(norm.bias, std=3)
            norm.weight.data[::4] = 1e-3
    model.train()
    with torch.no_grad():
        for step in range(3):
            model(images(4, 3, 64, 96, seed=step, dtype=dtype))
    model.eval()
    return model


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    return list(y) if isinstance(y, (tuple, list)) else [y]


def deviation(ours, expected):
    """Largest difference, relative to the output's largest value."""
    return max(float((a.double() - b.double()).abs().max() / b.abs().max())
               for a, b in zip(ours, expected))


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request):
    return request.param


def test_computes_what_the_model_did(network, monkeypatch):
    """Large and small maps, to 1e-12 in float64 and 1e-4 in float32; no norm is left."""
    model = trained(network)
    folded = fuse_ce(copy.deepcopy(model))
    single = fuse_ce(copy.deepcopy(model).float())
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
    folded = fuse_ce(copy.deepcopy(model))
    assert deviation(outputs(folded, x), outputs(model, x)) < 1e-12
    # the convolutions from 3 and from 12 channels, not the 3x3 one
    assert [shape[1] for shape in calls] == ([3, 12] if without_x else [3])


def test_sizes_without_variance_or_images():
    model = trained(sequential)
    folded = fuse_ce(copy.deepcopy(model))
    for size in ((2, 3, 1, 1), (0, 3, 8, 8), (1, 3, 2, 1)):
        torch.testing.assert_close(outputs(folded, images(*size)), outputs(model, images(*size)))


def test_bd_alone_is_a_convolution():
    folded = fuse_ce(trained(NETWORKS['BD alone']))
    assert not [m for m in folded.modules() if isinstance(m, (CE, CEConv2d))]


def test_channels_last_stays_so():
    """Without a copy to NCHW where the convolution is 1x1 and the map large."""
    model = fuse_ce(trained(lambda: insert_ce(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)), '.*')))
    x = images(2, 3, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # the copy warns
        ours, = outputs(model, last)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, *outputs(model, x))


@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_half_precision(dtype):
    """As good as the unfolded model in the same type, with statistics in float32."""
    exact = trained(NETWORKS['CE-ResNet-50'])
    x = images(2, 3, 96, 96, seed=9)
    expected = outputs(exact, x)
    model = copy.deepcopy(exact).to(dtype)
    folded = fuse_ce(copy.deepcopy(exact)).to(dtype)
    ours = outputs(folded, x.to(dtype))
    assert all(y.dtype == dtype for y in ours)
    assert deviation(ours, expected) < 2 * deviation(outputs(model, x.to(dtype)), expected)


class TestRefusal:

    def refused(self, model, *texts):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match='cannot be folded') as error:
            fuse_ce(model)
        for text in texts:
            assert text in str(error.value)
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_training_mode(self):
        model = trained(sequential)
        model.train()
        self.refused(model, '1.ce (', '6.ce (', 'model.eval()')

    def test_unset_statistics(self):
        model = sequential()
        model.eval()
        self.refused(model, '1.ce (', 'never trained or loaded')

    def test_other_norms(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), CEGN(8, num_groups=2))
        model(torch.randn(2, 3, 8, 8))
        self.refused(model.eval(), '1.ce (its norm is a GroupNorm')

    def test_ce_before_its_norm(self):
        model = insert_ce(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), '.*', before=True)
        model(torch.randn(2, 3, 8, 8))
        self.refused(model.eval(), '1.ce (CE stands before its norm')

    def test_no_convolution(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), CE(8))
        model(torch.randn(2, 3, 8, 8))
        self.refused(model.eval(), '3 (no convolution and norm')

    @pytest.mark.parametrize('place', ['after_conv1', 'after_conv2'])
    def test_plugins_behind_a_relu(self, place):
        model = trained(lambda: ResNet(50, **SLIM, plugins=[{**PLUGIN[0], 'position': place}]))
        self.refused(model, 'layer1.0.ce', 'no convolution and norm')

    def test_a_folded_model_cannot_be_trained(self):
        with pytest.raises(RuntimeError, match='folded for inference'):
            fuse_ce(trained(sequential)).train()


def test_blocks_whose_norm_comes_first_stay_as_they_are():
    class PreActivation(nn.Module):

        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv1(self.bn1(x))

    model = trained(PreActivation)
    expected = outputs(model, images(2, 3, 8, 8))
    torch.testing.assert_close(outputs(fuse_ce(model), images(2, 3, 8, 8)), expected)
    assert isinstance(model.bn1, nn.BatchNorm2d)


@pytest.mark.long
@pytest.mark.skipif(not CAN_EXPORT, reason='needs torch 2.7')
def test_compiles_and_exports_without_graph_breaks():
    folded = fuse_ce(trained(NETWORKS['CE-ResNet-50'], torch.float32))
    x = images(1, 3, 96, 64, dtype=torch.float32)
    compiled = torch.compile(folded, backend='aot_eager', fullgraph=True)
    assert deviation(outputs(compiled, x), outputs(folded, x)) < 1e-5
    height, width = (32 * torch.export.Dim(name, min=2, max=64) for name in 'hw')
    program = torch.export.export(folded, (x, ), dynamic_shapes={'x': {2: height, 3: width}})
    for size in ((64, 96), (224, 160)):
        x = images(1, 3, *size, dtype=torch.float32)
        assert deviation(outputs(program.module(), x), outputs(folded, x)) < 1e-5


def test_deploy_tool_exports_a_detector(tmp_path):
    """The command as typed: folded, exported, run in onnxruntime on three sizes."""
    sys.path.insert(0, str(ROOT / 'tools'))
    from _mmdet import build_model
    config = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes.py'
    model = build_model(config)
    checkpoint = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    arguments = [config, checkpoint, '--onnx', 'dense.onnx', '--size', 96, 128]
    failed = tool('deploy.py', *arguments, cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert 'statistics were never trained or loaded' in failed.stderr
    assert not list(tmp_path.glob('*.onnx*'))

    model.train()
    model.backbone(images(2, 3, 64, 64, dtype=torch.float32))
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    if not CAN_EXPORT:
        failed = tool('deploy.py', *arguments, cwd=tmp_path, check=False)
        assert failed.returncode == 1
        assert 'ONNX export needs torch 2.7 or newer' in failed.stderr
        assert not list(tmp_path.glob('*onnx*'))
        return
    output = tool('deploy.py', *arguments, cwd=tmp_path).stdout
    assert '9 CE layers folded' in output
    errors = [float(e) for e in re.findall(r'onnxruntime at .*: within (\S+)', output)]
    assert len(errors) == 3
    assert max(errors) < 1e-3
    assert [p.name for p in tmp_path.glob('*onnx*')] == ['dense.onnx']


def test_export_refuses_odd_sizes(tmp_path):
    model = fuse_ce(trained(NETWORKS['CE-ResNet-18'], torch.float32))
    with pytest.raises(ValueError, match='multiples of 32, got 65 x 64'):
        export_onnx(model, tmp_path / 'x.onnx', torch.zeros(1, 3, 65, 64))
    assert len(DensePart(model)(torch.zeros(1, 3, 64, 64))) == 4
