"""Behaviour of the CE layer beyond parity and properties: gradients, modes, bad input."""
import copy
import pickle
import re

import pytest
import torch
from conftest import HALF, LEGACY
from helpers.layers import (
    OFFSETS,
    check_gradients,
    covariance_error,
    kept_maps,
    random_input,
    same_state,
    state,
    strengthened,
)
from torch import nn

from cenet_mmdet import CE, DBN, IterNorm
from cenet_mmdet.layers.fused import batch_norm_ce
from cenet_mmdet.layers.reference import reference_ce
from cenet_mmdet.layers.steps.moments import batch_moments
from cenet_mmdet.layers.steps.whitening import newton_whitening

BRANCHES = {'both': None, 'fixed': 0.3, 'BD alone': 1.0, 'IR alone': 0.0}
each_branch = pytest.mark.parametrize('bd_ratio', BRANCHES.values(), ids=BRANCHES)
both_modes = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


def double(*args, **kwargs):
    torch.manual_seed(0)
    return CE(*args, dtype=torch.float64, **kwargs)


class TestGradients:

    @each_branch
    @both_modes
    def test_gradcheck(self, bd_ratio, training):
        ce = double(4, group_size=2, reduction=2, bd_ratio=bd_ratio)
        ce(random_input(4, 4, 5, 5, seed=1))  # statistics that are not the initial ones
        check_gradients(ce.train(training), random_input(2, 4, 1, 3))

    def test_moments_and_their_gradient_are_those_of_the_definition(self):
        x = random_input(2, 3, 4, 7).requires_grad_()
        pixels = x.permute(1, 2, 0, 3).flatten(2)
        centred = pixels - pixels.mean(-1, keepdim=True)
        expected = pixels.mean(-1), centred @ centred.mT / 14, x.var(-1)
        ours = batch_moments(x)
        got = ours.mean, ours.covariance, ours.variance
        torch.testing.assert_close(got, expected)
        weights = [random_input(*moment.shape, seed=1) for moment in got]
        gradients = [torch.autograd.grad(moments, x, weights)[0] for moments in (got, expected)]
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize('num_iters', [1, 2, 3, 5])
    def test_newtons_derivative_is_autograds(self, num_iters):
        a = random_input(3, 4, 7)
        covariance = (a @ a.mT).requires_grad_()
        weights = random_input(3, 4, 4, seed=1)

        def plain(covariance):
            sigma = covariance + 0.1 * torch.eye(4)
            s = sigma / sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
            p = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
            for _ in range(num_iters):
                p = 1.5 * p - 0.5 * p @ p @ p @ s
            return p

        ours = newton_whitening(covariance, torch.eye(4), 0.1, num_iters)
        got, = torch.autograd.grad((ours * weights).sum(), covariance)
        expected, = torch.autograd.grad((plain(covariance) * weights).sum(), covariance)
        torch.testing.assert_close(ours, plain(covariance))
        # of a symmetric matrix, the symmetric part is what counts
        torch.testing.assert_close(got + got.mT, expected + expected.mT)

    @pytest.mark.parametrize('cls', [CE, IterNorm, DBN])
    def test_nothing_of_the_size_of_the_map_is_kept_but_the_input(self, cls):
        layer, x = cls(32), random_input(2, 32, 24, 24, dtype=torch.float32).requires_grad_()
        assert kept_maps(lambda: layer(x), x.numel()) == {x.untyped_storage().data_ptr()}


class TestDefinition:
    """Against formulas written out without sharing code with the package."""

    def test_lambda_mixes_the_branches(self):
        """With the same statistics, the output is linear in lambda between BD and IR."""
        x = random_input(2, 8, 5, 5)
        learned, fixed = double(8, group_size=4), double(8, group_size=4, bd_ratio=0.3)
        nn.init.constant_(learned.lambda_logit, torch.tensor(0.3).logit())
        bd, ir = double(8, group_size=4, bd_ratio=1.0), double(8, group_size=4, bd_ratio=0.0)
        for ce in (fixed, ir):
            ce.load_state_dict(learned.state_dict(), strict=False)
        expected = 0.3 * bd(x) + 0.7 * ir(x)
        torch.testing.assert_close(learned(x), expected, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(fixed(x), expected)

    def test_evaluation_starts_without_mixing(self):
        """W = I and s = 1 before the first batch: BD alone is the identity."""
        x = random_input(2, 8, 5, 5)
        torch.testing.assert_close(double(8, bd_ratio=1.0).eval()(x), x)

    @pytest.mark.parametrize('offsets', OFFSETS.values(), ids=OFFSETS)
    def test_covariance_keeps_its_digits(self, offsets):
        """float32, far from 0 and in inhibited channels: error below 1e-4 of a variance."""
        mean, std = torch.tensor(offsets, dtype=torch.float64).T.unsqueeze(-1)  # (8, 1) each
        x = (random_input(1, 1, 8, 1800) * std + mean).float()
        assert covariance_error(batch_moments(x).covariance, [x], std) < 1e-4


class TestShapes:

    @pytest.mark.parametrize(('channels', 'asked', 'used'), [
        (64, 16, 16), (24, 64, 8), (24, 16, 8), (7, 16, 1), (48, None, 48), (6, 3, 3), (10, 3, 1)])
    @pytest.mark.parametrize('cls', [CE, IterNorm, DBN])
    def test_group_size_is_halved_until_it_divides(self, cls, channels, asked, used):
        layer = cls(channels, group_size=asked)
        assert layer.group_size == used
        assert f'group_size={used}' in repr(layer)

    @pytest.mark.parametrize('shape', [(0, 8, 3, 3), (2, 8, 0, 3), (0, 8)], ids=str)
    @each_branch
    def test_empty_input(self, shape, bd_ratio):
        """Empty output, statistics untouched, zero gradients rather than none."""
        ce = double(8, group_size=4, bd_ratio=bd_ratio)
        ce(random_input(2, 8, 3, 3))
        before = state(ce)
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = ce(x)
        y.sum().backward()
        assert y.shape == shape
        assert same_state(before, ce)
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ce.parameters())

    def test_channels_last_stays_so_and_the_copy_is_told(self):
        x = random_input(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        with pytest.warns(UserWarning, match='channels_last input is copied'):
            y = double(8)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize('shape', [(2, 8, 1, 1), (1, 8, 4, 4), (1, 8, 1, 1), (1, 8)], ids=str)
    @each_branch
    @pytest.mark.parametrize('constant', [False, True], ids=['random', 'constant'])
    def test_degenerate_input_stays_finite(self, shape, bd_ratio, constant):
        ce = CE(8, group_size=4, bd_ratio=bd_ratio)
        x = random_input(*shape, dtype=torch.float32)
        x = (torch.full_like(x, 3.) if constant else x).requires_grad_()
        for mode in (True, False):
            y = ce.train(mode)(x)
            y.square().sum().backward()
            assert all(t.isfinite().all() for t in (y, x.grad, *state(ce).values(),
                                                    *(p.grad for p in ce.parameters())))

    def test_single_pixels_leave_the_running_scale(self):
        """One pixel has no variance, hence no scale to learn from."""
        ce = double(8)
        ce(random_input(2, 8, 4, 4))
        scale = ce.running_scale.clone()
        ce(random_input(2, 8, 1, 1))
        assert torch.equal(ce.running_scale, scale)

    @pytest.mark.parametrize('shape', [(2, 8, 1, 1), (0, 8, 3, 3)], ids=str)
    def test_shared_layer_over_levels(self, shape):
        """As in a head shared by the levels of a pyramid: two forwards, then one backward."""
        ce = double(8)
        small = random_input(*shape).requires_grad_()
        (ce(small).sum() + ce(random_input(2, 8, 4, 4)).sum()).backward()
        assert small.grad.isfinite().all()


class TestIdentityStart:

    @each_branch
    @both_modes
    def test_computes_its_input_at_first(self, bd_ratio, training):
        ce = double(8, group_size=4, bd_ratio=bd_ratio, identity_start=True)
        ce(random_input(2, 8, 4, 4, seed=1))
        x = random_input(2, 8, 4, 4)
        torch.testing.assert_close(ce.train(training)(x), x)
        norm = nn.BatchNorm2d(8, dtype=torch.float64).train(training)
        torch.testing.assert_close(batch_norm_ce(norm, ce, x), copy.deepcopy(norm)(x))

    @each_branch
    def test_is_between_input_and_ce(self, bd_ratio):
        ours = double(8, bd_ratio=bd_ratio, identity_start=True)
        nn.init.constant_(ours.strength, 0.3)
        x = random_input(2, 8, 4, 4)
        expected = x + 0.3 * (double(8, bd_ratio=bd_ratio)(x) - x)
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(reference_ce(ours, [x])[0][0], expected)

    def test_everything_learns_from_the_second_step_on(self):
        ce = double(8, identity_start=True)
        optimizer = torch.optim.SGD(ce.parameters(), 0.1)
        for learning in ({'strength'}, set(dict(ce.named_parameters()))):
            optimizer.zero_grad()
            error = ce(random_input(2, 8, 4, 4)) - random_input(2, 8, 4, 4, seed=1)
            error.square().sum().backward()
            assert {name for name, p in ce.named_parameters() if p.grad.any()} == learning
            optimizer.step()

    def test_weights_of_a_plain_layer_are_at_full_strength(self):
        plain, ours = double(8), double(8, identity_start=True)
        x = random_input(2, 8, 4, 4)
        plain(x)
        ours.load_state_dict(plain.state_dict())
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
        assert 'strength' not in plain.state_dict()

    @pytest.mark.parametrize(('freeze', 'learned'), [
        ('adaptive', ['strength']), ('all', []),
        ('none', ['lambda_logit', 'strength', *(f'reweighting.{name}' for name in (
            '0.weight', '1.weight', '1.bias', '3.weight'))])])
    def test_strength_learns_unless_all_is_frozen(self, freeze, learned):
        ce = CE(8, identity_start=True, freeze=freeze)
        assert [name for name, p in ce.named_parameters() if p.requires_grad] == learned


class TestModes:

    @pytest.mark.parametrize(('bd_ratio', 'kept', 'left_out'), [
        (1.0, 'whitening', ('scale', 'reweighting', 'lambda')),
        (0.0, 'scale', ('whitening', 'mean', 'lambda')),
        (0.5, 'whitening', ('lambda', ))])
    def test_unused_branches_have_no_state(self, bd_ratio, kept, left_out):
        names = ' '.join(CE(16, bd_ratio=bd_ratio).state_dict())
        assert kept in names
        assert not any(word in names for word in left_out)

    def test_ir_alone_computes_no_matrix_product_over_the_map(self):
        """The branch that is left out costs nothing."""
        ce = CE(16, bd_ratio=0.0)
        x = random_input(2, 16, 6, 6, dtype=torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ce(x)
        assert not {'aten::bmm', 'aten::baddbmm'} & {e.key for e in profile.key_averages()}

    @pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
    def test_half_precision_keeps_its_type_and_float32_statistics(self, dtype):
        torch.manual_seed(0)
        ce = CE(16)
        reference = copy.deepcopy(ce)
        x = random_input(2, 16, 12, 12, dtype=torch.float32) + 3
        with torch.autocast('cpu', dtype):
            y = ce(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), reference(x.to(dtype).float()), rtol=0.02, atol=0.05)
        torch.testing.assert_close(ce.running_whitening, reference.running_whitening)

    def test_deep_copy_and_pickle(self):
        ce, x = double(8), random_input(2, 8, 4, 4)
        ce(x)
        ce.eval()
        for clone in (copy.deepcopy(ce), pickle.loads(pickle.dumps(ce))):
            torch.testing.assert_close(clone(x), ce(x))

    @both_modes
    def test_torch_compile_without_graph_breaks(self, training):
        """Traced whole, forward and backward; tracing needs no compiler.

        torch 2.1 traces no custom gradients: it breaks the graph there.
        """
        plain = double(8).train(training)
        compiled = torch.compile(copy.deepcopy(plain), backend='aot_eager', fullgraph=not LEGACY)
        x, grad = random_input(2, 8, 4, 4).requires_grad_(), random_input(2, 8, 4, 4, seed=1)
        results = []
        for ce in (compiled, plain):
            y = ce(x)
            results.append((y, *torch.autograd.grad(y, x, grad), *ce.buffers()))
        torch.testing.assert_close(*results)

    @pytest.mark.skipif(LEGACY, reason='torch 2.1 exports otherwise')
    @pytest.mark.parametrize('identity_start', [False, True])
    def test_exported_for_every_size(self, identity_start):
        ce = strengthened(double(8, identity_start=identity_start))
        ce(random_input(2, 8, 4, 4))
        sizes = {2: torch.export.Dim('h', min=2, max=64), 3: torch.export.Dim('w', min=2, max=64)}
        program = torch.export.export(ce.eval(), (random_input(2, 8, 5, 6), ),
                                      dynamic_shapes={'x': sizes}).module()
        for x in (random_input(2, 8, 5, 6), random_input(2, 8, 9, 3)):
            torch.testing.assert_close(program(x), ce(x))

    def test_torch_func_in_evaluation(self):
        """Gradients of each sample's loss at once; training would have to write buffers."""
        ce = double(8)
        ce(random_input(4, 8, 5, 5))
        ce.eval()
        parameters, x = dict(ce.named_parameters()), random_input(3, 1, 8, 4, 4, seed=1)

        def loss(parameters, sample):
            return torch.func.functional_call(ce, parameters, (sample, )).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        torch.testing.assert_close(torch.func.vmap(ce)(x)[:, 0], ce(x[:, 0]))
        for n, sample in enumerate(x):
            expected = torch.autograd.grad(loss(parameters, sample), parameters.values())
            torch.testing.assert_close([e[n] for e in each.values()], list(expected))


class TestBadInput:

    @pytest.mark.parametrize('arguments', [
        dict(in_channels=0), dict(in_channels=8.0), dict(group_size=0), dict(group_size=-4),
        dict(group_size=2.5), dict(num_iters=0), dict(eps=0), dict(eps=float('nan')),
        dict(momentum=1.5), dict(momentum=-0.1), dict(reduction=0), dict(bd_ratio=-0.1),
        dict(bd_ratio=1.1), dict(bd_ratio=float('nan')), dict(freeze='some'), dict(freeze=None),
    ], ids=str)
    def test_arguments_are_refused_by_name(self, arguments):
        (name, value), = arguments.items()
        with pytest.raises(ValueError, match=name) as error:
            CE(**{'in_channels': 8, **arguments})
        assert repr(value) in str(error.value)

    @pytest.mark.parametrize('shape', [(8, ), (), (2, 4, 3, 3), (2, 16)], ids=str)
    def test_input_is_refused_with_both_shapes(self, shape):
        with pytest.raises(ValueError, match=rf'CE expects .*8.*{re.escape(str(shape))}'):
            CE(8)(torch.zeros(shape))
