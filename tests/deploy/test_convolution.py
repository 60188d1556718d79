"""What is folded into layers of all geometries, against the layers one after the other."""
import pytest
import torch
from helpers.norms import BatchNormAct2d, DetrFrozenBatchNorm2d, FrozenBatchNorm2d
from hypothesis import given
from hypothesis import strategies as st
from mmcv.ops import ModulatedDeformConv2dPack
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

from cenet_mmdet import CE, insert_ce
from cenet_mmdet.deploy import CEConv2d, fuse_ce
from cenet_mmdet.models.insert import NormCE

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@torch.no_grad()
def with_statistics(layer):
    """Parameters and statistics that no initial layer has."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name.endswith('num_batches_tracked'):
            tensor.fill_(1)
        elif name.endswith(('running_var', 'running_scale')):
            nn.init.uniform_(tensor, 0.5, 2)
        elif not name.endswith('identity'):
            nn.init.normal_(tensor)
    return layer.double().eval()


@torch.no_grad()
def folded_as_unfolded(model, x):
    """The folded model, which computes the same on the example and on another input."""
    inputs = x.double(), torch.randn_like(x).double()
    expected = [model(u) for u in inputs]
    folded = fuse_ce(model, inputs[0])
    for u, y in zip(inputs, expected):
        torch.testing.assert_close(folded(u), y, rtol=1e-11, atol=1e-11 * float(y.abs().max()))
    return folded


@st.composite
def layers(draw):
    """A convolution or linear layer, its output channels, and the shape of an input."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 4, 8)))
    channels = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 8))
    dims = draw(st.integers(0, 3))
    bias = draw(st.booleans())
    if not dims:
        return nn.Linear(*channels, bias=bias), channels[1], (3, channels[0])
    kernel = draw(st.sampled_from((1, 1, 2, 3)))
    arguments = dict(bias=bias, groups=groups, stride=draw(st.integers(1, 2)),
                     dilation=draw(st.integers(1, 2)), padding=draw(st.integers(0, 2)))
    kinds = TRANSPOSED if draw(st.integers(0, 5)) == 0 else CONVOLUTIONS
    if kinds is CONVOLUTIONS:
        arguments['padding_mode'] = draw(st.sampled_from(('zeros', 'reflect', 'circular')))
        if arguments['stride'] == 1 and draw(st.booleans()):
            arguments['padding'] = 'same'
    layer = kinds[dims](*channels, kernel, **arguments)
    if draw(st.integers(0, 5)) == 0:
        layer = weight_norm(layer)
    return layer, channels[1], (2, channels[0], *[draw(st.integers(5, 7))] * dims)


@given(geometry=layers(), bd_ratio=st.sampled_from((None, 0., 0.3, 1.)),
       group_size=st.integers(1, 16), norm=st.sampled_from(('affine', 'plain', 'frozen', 'no CE')),
       inserted=st.booleans(), seed=st.integers(0, 99))
def test_every_geometry(geometry, bd_ratio, group_size, norm, inserted, seed):
    torch.manual_seed(seed)
    layer, channels, shape = geometry
    batch_norm = (FrozenBatchNorm2d(channels) if norm == 'frozen'
                  else BATCH_NORMS[len(shape) - 2](channels, affine=norm != 'plain'))
    ce = CE(channels, group_size, bd_ratio=bd_ratio)
    behind = [NormCE(batch_norm, ce)] if inserted else [batch_norm, ce]
    model = nn.Sequential(layer, *(behind[:1] if norm == 'no CE' else behind), nn.ReLU())
    folded = folded_as_unfolded(with_statistics(model), torch.randn(shape))
    if type(layer) in (nn.Linear, *CONVOLUTIONS.values()):
        assert not [m for m in folded.modules() if isinstance(m, (FrozenBatchNorm2d, _BatchNorm))]


@pytest.mark.parametrize(('groups', 'group_size', 'kind'), [
    (1, 16, nn.Conv2d), (4, 4, nn.Conv2d), (16, 4, CEConv2d), (4, 8, CEConv2d)])
def test_bd_alone_behind_grouped_convolutions(groups, group_size, kind):
    """It is merged into the weights if no whitening group has channels of two groups."""
    model = with_statistics(nn.Sequential(
        nn.Conv2d(16, 16, 3, groups=groups), nn.BatchNorm2d(16), CE(16, group_size, bd_ratio=1.)))
    assert type(folded_as_unfolded(model, torch.randn(2, 16, 6, 6))[0]) is kind


@pytest.mark.parametrize('norm', [DetrFrozenBatchNorm2d, BatchNormAct2d,
                                  lambda channels: BatchNormAct2d(channels, nn.PReLU)])
def test_norms_of_other_libraries(norm):
    """With CE, and without, where the activation is left."""
    x = torch.randn(2, 3, 6, 6)
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 4, 1))  # noqa: E731
    for model in (insert_ce(make(), '1'), make()):
        folded = folded_as_unfolded(with_statistics(model), x)
        assert not [m for m in folded.modules() if isinstance(m, (FrozenBatchNorm2d, _BatchNorm))]


class Scaled(FrozenBatchNorm2d):
    """Only looks like a frozen batch norm."""

    def forward(self, x):
        return super().forward(x) * 1.001


@pytest.mark.parametrize('norm', [Scaled, nn.BatchNorm2d])
def test_norms_that_depend_on_more_than_their_statistics_stay(norm):
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)))
    model[1].train()
    assert type(folded_as_unfolded(model, torch.randn(2, 3, 6, 6))[1]) is norm


@pytest.mark.parametrize('layer', [
    lambda: ModulatedDeformConv2dPack(4, 8, 3), lambda: nn.utils.weight_norm(nn.Conv2d(4, 8, 3)),
    lambda: nn.AvgPool2d(2)])
def test_other_layers_keep_norm_and_ce_behind_them(layer):
    channels = 4 if isinstance(layer(), nn.AvgPool2d) else 8
    model = with_statistics(nn.Sequential(layer(), nn.BatchNorm2d(channels), CE(channels)))
    folded = folded_as_unfolded(model, torch.randn(2, 4, 6, 6))
    assert [type(m) for m in folded][1:] == [NormCE, nn.Identity]


@pytest.mark.parametrize(('layer', 'shape'), [(nn.Linear(4, 6), (2, 6, 4)),
                                              (nn.Conv2d(4, 6, 1), (4, 6, 6))])
def test_channels_in_another_dimension(layer, shape):
    """The norm's channels are not the layer's."""
    model = with_statistics(nn.Sequential(layer, nn.BatchNorm1d(6), CE(6, 3)))
    assert isinstance(folded_as_unfolded(model, torch.randn(shape))[1], NormCE)
