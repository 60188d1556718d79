"""How many operations the layers take, and that none of them waits for a value of a GPU."""
import pytest
import torch
from torch import nn

from cenet_mmdet import CE
from cenet_mmdet.analysis.operations import count_operations
from cenet_mmdet.layers.fused import batch_norm_ce, can_fuse
from cenet_mmdet.layers.steps.all_reduce import _pack, _unpack
from cenet_mmdet.layers.steps.moments import batch_moments

# layer: forward in training, backward, forward in evaluation
CEILINGS = {
    'CE': (38, 61, 15),
    'BD alone': (26, 32, 2),
    'IR alone': (20, 30, 13),
    'BN + CE': (54, 92, 16),
}
OPTIONS = {'BD alone': dict(bd_ratio=1.), 'IR alone': dict(bd_ratio=0.)}


def function(name):
    """The layer on a small map, and how to switch its mode."""
    norm, ce = nn.BatchNorm2d(32), CE(32, **OPTIONS.get(name, {}))
    both = nn.ModuleList([norm, ce])
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    return both, (lambda: batch_norm_ce(norm, ce, x)) if 'BN' in name else (lambda: ce(x))


@pytest.mark.parametrize('name', CEILINGS)
def test_operations_of_a_layer(name):
    layers, forward = function(name)
    ahead, back = count_operations(forward, backward=True)
    layers.eval()
    with torch.no_grad():
        evaluation, _ = count_operations(forward, backward=False)
    counts = tuple(sum(counted.values()) for counted in (ahead, back, evaluation))
    ceilings = CEILINGS[name]
    assert all(count <= ceiling for count, ceiling in zip(counts, ceilings)), counts


@pytest.mark.parametrize('mode', ['training', 'frozen norm', 'evaluation'])
@pytest.mark.parametrize('options', [{}, dict(bd_ratio=1.), dict(bd_ratio=0.),
                                     dict(identity_start=True)], ids=str)
def test_no_step_waits_for_a_value(options, mode):
    """On torch's meta device there are no values: asking for one fails, as does mixing devices."""
    with torch.device('meta'):
        norm, ce = nn.BatchNorm2d(32), CE(32, **options)
        x = torch.randn(2, 32, 8, 8, requires_grad=True)
    norm.train(mode == 'training')
    ce.train(mode != 'evaluation')
    assert can_fuse(norm, ce, x) is ce.has_bd
    for out in (ce(x), batch_norm_ce(norm, ce, x)):
        out.sum().backward()
        assert out.device.type == x.grad.device.type == 'meta'


def test_synchronized_moments_wait_for_no_value():
    """All of SyncCE's second step but the collective."""
    moments = batch_moments(torch.randn(2, 4, 8, 64, device='meta'))
    total = _unpack(_pack(moments), moments)
    assert total.covariance.device.type == total.pixels.device.type == 'meta'
