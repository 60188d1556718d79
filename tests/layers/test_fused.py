"""BN and CE in one pass: what ce(norm(z)) gives, with less work and fewer lost digits."""
import copy

import pytest
import torch
from conftest import HALF
from helpers.layers import check_gradients, kept_maps, random_input, strengthened
from torch import nn

from cenet_mmdet import CE
from cenet_mmdet.layers.fused import batch_affine, batch_norm_ce, can_fuse
from cenet_mmdet.layers.steps.moments import batch_moments
from cenet_mmdet.models.insert import NormCE

NORMS = {'plain': {}, 'cumulative': dict(momentum=None), 'no affine': dict(affine=False),
         'untracked': dict(track_running_stats=False), 'momentum 0.3': dict(momentum=0.3)}
LAYERS = {'both': {}, 'BD alone': dict(bd_ratio=1.0), 'fixed': dict(bd_ratio=0.3),
          'frozen F': dict(freeze='adaptive'), 'identity start': dict(identity_start=True)}


def pair(norm_options, ce_options, channels=16, dtype=torch.float64):
    """A batch norm with learned-like parameters, and a CE layer."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels, dtype=dtype, **norm_options)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.1, 2)
        nn.init.normal_(norm.bias)
    return norm, strengthened(CE(channels, **{'group_size': 4, **ce_options}, dtype=dtype))


def maps(*shape, **options):
    return 2 * random_input(*shape, **options) + 3


@pytest.mark.parametrize('mode', ['training', 'norm in evaluation', 'evaluation'])
@pytest.mark.parametrize('ce_options', LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize('norm_options', NORMS.values(), ids=NORMS)
def test_is_the_norm_and_then_ce(norm_options, ce_options, mode):
    """Outputs, gradients and all running statistics over three steps, to 1e-10."""
    norm, ce = pair(norm_options, ce_options)
    for step in range(2):  # statistics that are not the initial ones
        ce(norm(maps(3, 16, 5, 7, seed=10 + step)))
    if mode != 'training':
        norm.eval()
    if mode == 'evaluation':
        ce.eval()
    apart = copy.deepcopy((norm, ce))
    for step in range(3):
        z = maps(3, 16, 5, 7, seed=step).requires_grad_()
        other = z.detach().clone().requires_grad_()
        untracked = norm.running_mean is None
        assert can_fuse(norm, ce, z) is not (untracked and mode == 'evaluation')
        ours, expected = batch_norm_ce(norm, ce, z), apart[1](apart[0](other))
        grad = maps(*z.shape, seed=20 + step)
        ours.backward(grad)
        expected.backward(grad)
        close = dict(rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours, expected, **close)
        torch.testing.assert_close(z.grad, other.grad, **close)
        for mine, theirs in zip((norm, ce), apart):
            for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
                torch.testing.assert_close(p.grad, q.grad, **close, msg=name)
            for (name, b), c in zip(mine.named_buffers(), theirs.buffers()):
                torch.testing.assert_close(b, c, **close, msg=name)


@pytest.mark.parametrize('training', [True, False])
def test_gradients_of_both_orders(training):
    both = NormCE(*pair({}, dict(reduction=2), channels=4))
    both(maps(2, 4, 3, 3, seed=5))
    check_gradients(both.train(training), maps(2, 4, 3, 2))


def test_inhibited_channels_keep_their_digits():
    """gamma 1e-3 beside beta 0.3 to 30: the covariance in float32, in units of the deviations."""
    for beta, least_gain in ((0.3, 1), (3., 10), (30., 100)):
        norm, _ = pair({}, {}, channels=8)
        norm.weight.data[:4] = 1e-3
        norm.bias.data[:4] = beta
        z = maps(4, 8, 20, 20)
        single = copy.deepcopy(norm).float()
        expected = moments_of(norm(z)).covariance
        of_z = moments_of(z.float())
        ours = batch_affine(single, of_z).moments(of_z).covariance
        apart = moments_of(single(z.float())).covariance
        deviation = expected.diagonal(dim1=-2, dim2=-1).sqrt()
        unit = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
        error, others = (float(((s - expected) / unit).abs().max()) for s in (ours, apart))
        assert error < 1e-6
        assert others > least_gain * error, (beta, error, others)


def moments_of(x):
    return batch_moments(x.flatten(2).unsqueeze(1))


def test_one_map_is_kept_for_the_backward_pass():
    """The convolution's output, as batch norm alone keeps it."""
    norm, ce = pair({}, {})
    z = maps(4, 16, 20, 20).requires_grad_()
    kept = kept_maps(lambda: batch_norm_ce(norm, ce, z), z.numel())
    assert kept == {z.untyped_storage().data_ptr()}
    assert len(kept_maps(lambda: ce(norm(z)), z.numel())) == 2


class TestWhereItApplies:

    @pytest.mark.parametrize(('norm', 'ce'), [
        (nn.GroupNorm(2, 16), CE(16)), (nn.InstanceNorm2d(16), CE(16)), (nn.Identity(), CE(16)),
        (nn.BatchNorm2d(16), CE(16, bd_ratio=0.0)), (nn.BatchNorm2d(16), nn.Identity()),
        (nn.BatchNorm2d(16), CE(16, freeze='all'))], ids=str)  # only the norm learns
    def test_not_for_other_layers(self, norm, ce):
        assert not can_fuse(norm, ce, maps(2, 16, 4, 4, dtype=torch.float32))

    def test_not_where_someone_looks_on(self):
        """Forward hooks see what they would see without it."""
        norm, ce = pair({}, {})
        seen = []
        handle = ce.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
        z = maps(2, 16, 4, 4)
        batch_norm_ce(norm, ce, z)
        torch.testing.assert_close(seen[0], copy.deepcopy(norm)(z))
        handle.remove()
        assert can_fuse(norm, ce, z)

    def test_one_value_per_channel_is_refused_as_by_the_norm(self):
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            batch_norm_ce(*pair({}, {}), maps(1, 16, 1, 1))

    @pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
    def test_half_precision(self, dtype):
        """Output in the input's type, statistics in float32, errors like those of the parts."""
        norm, ce = pair({}, {}, dtype=torch.float32)
        exact = copy.deepcopy((norm, ce))
        apart = copy.deepcopy((norm, ce))
        z = maps(4, 16, 8, 8, dtype=torch.float32).to(dtype)
        with torch.autocast('cpu', dtype):
            ours, theirs = batch_norm_ce(norm, ce, z), apart[1](apart[0](z))
        expected = exact[1](exact[0](z.float()))
        assert ours.dtype == theirs.dtype == dtype
        error, others = ((y.float() - expected).abs().max() for y in (ours, theirs))
        assert error < 2 * others
        torch.testing.assert_close(norm.running_var, exact[0].running_var)
        torch.testing.assert_close(ce.running_whitening, exact[1].running_whitening)
