"""Behaviour of the CE layer beyond parity: gradients, shapes, modes, bad input."""
import copy

import pytest
import torch
from conftest import HALF, LEGACY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cenet_mmdet import CE
from cenet_mmdet.layers.fused import batch_norm_ce
from cenet_mmdet.layers.reference import reference_ce
from cenet_mmdet.layers.steps.moments import batch_moments, instance_variance
from cenet_mmdet.layers.steps.whitening import newton_whitening

BRANCHES = {'both': None, 'fixed': 0.3, 'BD alone': 1.0, 'IR alone': 0.0}


def random_input(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def double(*args, **kwargs):
    torch.manual_seed(0)
    return CE(*args, dtype=torch.float64, **kwargs)


def batch_covariance(grouped):
    """Covariance (G, d, d) of a grouped feature map (N, G, d, L)."""
    return batch_moments(grouped).covariance


def snapshot(ce):
    return {name: buffer.clone() for name, buffer in ce.named_buffers()}


def same(before, ce):
    return all(torch.equal(before[name], buffer) for name, buffer in ce.named_buffers())


class TestGradients:

    @pytest.mark.parametrize('bd_ratio', BRANCHES.values(), ids=BRANCHES)
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_gradcheck(self, bd_ratio, training):
        """Input and all parameters, first and second order."""
        ce = double(4, group_size=2, reduction=2, bd_ratio=bd_ratio)
        ce(random_input(4, 4, 5, 5, seed=1))  # statistics that are not the initial ones
        ce.train(training)
        parameters = [p.detach().clone().requires_grad_() for p in ce.parameters()]
        names = [name for name, _ in ce.named_parameters()]

        def function(x, *values):
            return torch.func.functional_call(ce, dict(zip(names, values)), (x, ))

        inputs = random_input(2, 4, 1, 3).requires_grad_(), *parameters
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_moments_match_plain_autograd(self):
        """The custom backward equals what autograd makes of the definition."""
        x = random_input(2, 3, 4, 7).requires_grad_()
        ours = batch_moments(x)
        pixels = x.permute(1, 2, 0, 3).flatten(2)
        mean = pixels.mean(-1)
        centred = pixels - mean.unsqueeze(-1)
        expected = mean, centred @ centred.mT / 14, x.var(-1)
        got = ours.mean, ours.covariance, ours.variance
        weights = [random_input(*moment.shape, seed=1) for moment in got]

        def gradient(moments):
            total = sum((weight * moment).sum() for weight, moment in zip(weights, moments))
            return torch.autograd.grad(total, x)[0]

        torch.testing.assert_close(gradient(got), gradient(expected))

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

    def test_nothing_of_the_size_of_the_map_is_kept_but_the_input(self):
        """Graph of a training step: no saved tensor has the input's size but the input."""
        ce = CE(32)
        x = random_input(2, 32, 24, 24, dtype=torch.float32).requires_grad_()
        kept = set()

        def pack(tensor):
            if tensor.numel() >= x.numel():
                kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ce(x)
        assert kept == {x.untyped_storage().data_ptr()}


class TestDefinition:
    """Against formulas written out without sharing code with the package."""

    def test_covariance_is_that_of_all_pixels(self):
        x = random_input(3, 12, 4, 5)
        got = batch_covariance(x.reshape(3, 2, 6, 20))
        for group, ours in zip(x.split(6, dim=1), got):
            pixels = group.transpose(0, 1).reshape(6, -1)
            torch.testing.assert_close(ours, torch.cov(pixels, correction=0))

    def test_instance_variance(self):
        x = random_input(3, 2, 6, 20)
        torch.testing.assert_close(instance_variance(x), x.var(-1))

    def test_newton_converges_to_the_inverse_root(self):
        a = random_input(1, 6, 6)
        sigma = a @ a.mT + 3 * torch.eye(6)
        values, vectors = torch.linalg.eigh(sigma / sigma.diagonal(dim1=-2, dim2=-1).sum())
        root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
        torch.testing.assert_close(newton_whitening(sigma, torch.eye(6), 0, 10), root)

    def test_three_iterations_gain_at_most_1_5_cubed(self):
        sigma = torch.diag_embed(torch.tensor([[1., 1e-9, 1e-9, 1e-9]]))
        gain = torch.linalg.eigvalsh(newton_whitening(sigma, torch.eye(4), 0, 3)).max()
        assert gain == pytest.approx(1.5**3, rel=1e-6)

    def test_lambda_mixes_the_branches(self):
        """With the same statistics, the output is linear in lambda between BD and IR."""
        x = random_input(2, 8, 5, 5)
        learned = double(8, group_size=4)
        nn.init.constant_(learned.lambda_logit, 0.7)
        bd, ir = double(8, group_size=4, bd_ratio=1.0), double(8, group_size=4, bd_ratio=0.0)
        ir.load_state_dict(learned.state_dict(), strict=False)
        ratio = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
        torch.testing.assert_close(learned(x), ratio * bd(x) + (1 - ratio) * ir(x))

    def test_fixed_ratio_is_that_lambda(self):
        x = random_input(2, 8, 5, 5)
        fixed, learned = double(8, bd_ratio=0.25), double(8)
        fixed.load_state_dict(learned.state_dict(), strict=False)
        nn.init.constant_(learned.lambda_logit, torch.tensor(0.25).logit())
        torch.testing.assert_close(fixed(x), learned(x), atol=1e-7, rtol=1e-6)

    def test_evaluation_starts_without_mixing(self):
        """W = I and s = 1 before the first batch: BD alone is the identity."""
        x = random_input(2, 8, 5, 5)
        torch.testing.assert_close(double(8, bd_ratio=1.0).eval()(x), x)

    @pytest.mark.parametrize('offset', [1, 10, 100, 1000])
    def test_covariance_keeps_its_digits_under_offsets(self, offset):
        """float32, means of `offset` standard deviations: error below 1e-4 of a variance."""
        x = (random_input(2, 1, 16, 900) + offset).float()
        exact = batch_covariance(x.double())
        error = batch_covariance(x) - exact
        assert error.abs().max() < 1e-4 * exact.diagonal(dim1=-2, dim2=-1).min()

    def test_covariance_keeps_its_digits_in_inhibited_channels(self):
        """float32, gamma 1e-3 and beta 0.3 in half of the channels."""
        gamma = torch.tensor([1., 1e-3]).repeat(8).view(16, 1)
        x = random_input(2, 1, 16, 900, dtype=torch.float32) * gamma + 0.3
        exact = batch_covariance(x.double())
        deviation = exact.diagonal(dim1=-2, dim2=-1).sqrt()
        error = (batch_covariance(x) - exact).abs()
        assert (error / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))).max() < 1e-4


class TestShapes:

    @pytest.mark.parametrize('shape', [(4, 8), (4, 8, 5), (4, 8, 3, 5), (4, 8, 2, 3, 2)], ids=str)
    def test_any_number_of_spatial_dimensions(self, shape):
        ce = double(8, group_size=4)
        x = random_input(*shape)
        assert ce(x).shape == shape
        if len(shape) > 2:
            flat = double(8, group_size=4)(x.flatten(2))
            torch.testing.assert_close(double(8, group_size=4)(x).flatten(2), flat)

    @pytest.mark.parametrize(('channels', 'asked', 'used'), [
        (64, 16, 16), (24, 64, 8), (24, 16, 8), (7, 16, 1), (48, None, 48), (6, 3, 3), (10, 3, 1)])
    def test_group_size_is_halved_until_it_divides(self, channels, asked, used):
        ce = CE(channels, group_size=asked)
        assert ce.group_size == used
        assert f'group_size={used}' in repr(ce)

    @pytest.mark.parametrize('shape', [(0, 8, 3, 3), (2, 8, 0, 3), (0, 8)], ids=str)
    @pytest.mark.parametrize('bd_ratio', BRANCHES.values(), ids=BRANCHES)
    def test_empty_input(self, shape, bd_ratio):
        """Empty output, statistics untouched, zero gradients rather than none."""
        ce = double(8, group_size=4, bd_ratio=bd_ratio)
        ce(random_input(2, 8, 3, 3))
        before = snapshot(ce)
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = ce(x)
        y.sum().backward()
        assert y.shape == shape
        assert same(before, ce)
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ce.parameters())

    @pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'sliced'])
    def test_layout_does_not_matter(self, layout):
        x = random_input(2, 8, 6, 6)
        other = {'channels_last': x.contiguous(memory_format=torch.channels_last),
                 'transposed': x.mT.contiguous().mT,
                 'sliced': torch.cat([x, x], -1)[..., :6]}[layout]
        torch.testing.assert_close(double(8)(other), double(8)(x))

    def test_channels_last_stays_so_and_the_copy_is_told(self):
        x = random_input(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        with pytest.warns(UserWarning, match='channels_last input is copied'):
            y = double(8)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)


class TestDegenerateInput:

    @pytest.mark.parametrize('shape', [(2, 8, 1, 1), (1, 8, 4, 4), (1, 8, 1, 1), (1, 8)], ids=str)
    @pytest.mark.parametrize('bd_ratio', BRANCHES.values(), ids=BRANCHES)
    @pytest.mark.parametrize('constant', [False, True], ids=['random', 'constant'])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
    def test_finite_output_and_gradients(self, shape, bd_ratio, constant, dtype):
        ce = CE(8, group_size=4, bd_ratio=bd_ratio, dtype=dtype)
        x = random_input(*shape, dtype=dtype)
        x = (torch.full_like(x, 3.) if constant else x).requires_grad_()
        for mode in (True, False):
            y = ce.train(mode)(x)
            y.square().sum().backward()
            assert y.isfinite().all()
            assert all(t.isfinite().all() for t in (x.grad, *snapshot(ce).values(),
                                                    *(p.grad for p in ce.parameters())))

    def test_single_pixels_leave_the_running_scale(self):
        """One pixel has no variance, hence no scale to learn from."""
        ce = double(8)
        ce(random_input(2, 8, 4, 4))
        scale = ce.running_scale.clone()
        ce(random_input(2, 8, 1, 1))
        assert torch.equal(ce.running_scale, scale)

    @settings(deadline=None, max_examples=60)
    @given(n=st.integers(0, 3), channels=st.integers(1, 20), height=st.integers(0, 4),
           width=st.integers(1, 4), group_size=st.none() | st.integers(1, 32),
           bd_ratio=st.sampled_from([None, 0.0, 0.4, 1.0]),
           scale=st.sampled_from([1e-6, 1e-2, 1., 1e4]), offset=st.sampled_from([0., 1., 1e4]),
           training=st.booleans(), seed=st.integers(0, 99))
    def test_finite_in_finite_out(self, n, channels, height, width, group_size, bd_ratio, scale,
                                  offset, training, seed):
        ce = CE(channels, group_size=group_size, bd_ratio=bd_ratio).train(training)
        x = random_input(n, channels, height, width, seed=seed, dtype=torch.float32)
        x = (x * scale + offset).requires_grad_()
        y = ce(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(value.isfinite().all() for value in ce.state_dict().values())


class TestIdentityStart:

    @pytest.mark.parametrize('bd_ratio', BRANCHES.values(), ids=BRANCHES)
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_computes_its_input_at_first(self, bd_ratio, training):
        ce = double(8, group_size=4, bd_ratio=bd_ratio, identity_start=True)
        ce(random_input(2, 8, 4, 4, seed=1))
        x = random_input(2, 8, 4, 4)
        torch.testing.assert_close(ce.train(training)(x), x)
        norm = nn.BatchNorm2d(8, dtype=torch.float64).train(training)
        torch.testing.assert_close(batch_norm_ce(norm, ce, x), copy.deepcopy(norm)(x))

    @pytest.mark.parametrize('bd_ratio', BRANCHES.values(), ids=BRANCHES)
    def test_is_between_input_and_ce(self, bd_ratio):
        ours = double(8, bd_ratio=bd_ratio, identity_start=True)
        plain = double(8, bd_ratio=bd_ratio)
        nn.init.constant_(ours.strength, 0.3)
        x = random_input(2, 8, 4, 4)
        torch.testing.assert_close(ours(x), x + 0.3 * (plain(x) - x))
        torch.testing.assert_close(reference_ce(ours, [x])[0][0], x + 0.3 * (plain(x) - x))

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
        assert not double(8, identity_start=True, freeze='adaptive').strength.requires_grad


class TestModes:

    @pytest.mark.parametrize(('freeze', 'learns', 'tracks'), [
        ('none', True, True), ('adaptive', False, True), ('all', False, False)])
    def test_freeze(self, freeze, learns, tracks):
        ce = double(8, freeze=freeze)
        assert {p.requires_grad for p in ce.parameters()} == {learns}
        x = random_input(2, 8, 4, 4).requires_grad_()
        before = snapshot(ce)
        ce.train()
        y = ce(x)
        y.sum().backward()
        assert same(before, ce) is not tracks
        assert x.grad.abs().max() > 0
        evaluated = ce.eval()(x)
        assert torch.equal(y, evaluated) is (freeze == 'all')

    def test_evaluation_does_not_mix_samples(self):
        ce = double(8)
        ce(random_input(4, 8, 5, 5))
        ce.eval()
        x = random_input(3, 8, 5, 5, seed=1)
        torch.testing.assert_close(ce(x)[1:2], ce(x[1:2]))

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

    def test_momentum_is_the_weight_of_the_new_value(self):
        """Whitening matrices are averaged, not covariances."""
        ce = double(8, momentum=0.25)
        x = random_input(2, 8, 4, 4)
        covariance = batch_covariance(x.reshape(2, 1, 8, 16))
        whitening = newton_whitening(covariance, torch.eye(8), 1e-5, 3)
        ce(x)
        expected = 0.75 * torch.eye(8, dtype=torch.float64) + 0.25 * whitening[0]
        torch.testing.assert_close(ce.running_whitening[0], expected)
        assert ce.num_batches_tracked == 1

    @pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
    def test_half_precision_keeps_its_type_and_float32_statistics(self, dtype):
        torch.manual_seed(0)
        ce = CE(16)
        x = random_input(2, 16, 12, 12, dtype=torch.float32) + 3
        with torch.autocast('cpu', dtype):
            y = ce(x.to(dtype))
        assert y.dtype == dtype
        torch.manual_seed(0)
        reference = CE(16)
        torch.testing.assert_close(y.float(), reference(x.to(dtype).float()), rtol=0.02, atol=0.05)
        torch.testing.assert_close(ce.running_whitening, reference.running_whitening)

    @pytest.mark.parametrize('shape', [(2, 8, 1, 1), (0, 8, 3, 3)], ids=str)
    def test_shared_layer_over_levels(self, shape):
        """As in a head shared by the levels of a pyramid: two forwards, then one backward."""
        ce = double(8)
        small = random_input(*shape).requires_grad_()
        (ce(small).sum() + ce(random_input(2, 8, 4, 4)).sum()).backward()
        assert small.grad.isfinite().all()

    def test_deep_copy_and_pickle(self):
        import copy
        import pickle

        ce = double(8)
        x = random_input(2, 8, 4, 4)
        ce(x)
        ce.eval()
        for clone in (copy.deepcopy(ce), pickle.loads(pickle.dumps(ce))):
            torch.testing.assert_close(clone(x), ce(x))

    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_torch_compile_without_graph_breaks(self, training):
        """Traced whole, forward and backward; tracing needs no compiler.

        torch 2.1 traces no custom gradients: it breaks the graph there.
        """
        plain = double(8).train(training)
        compiled = torch.compile(copy.deepcopy(plain), backend='aot_eager',
                                 fullgraph=not LEGACY)
        x, grad = random_input(2, 8, 4, 4), random_input(2, 8, 4, 4, seed=1)
        results = []
        for ce in (compiled, plain):
            inputs = x.clone().requires_grad_()
            y = ce(inputs)
            results.append((y, *torch.autograd.grad(y, inputs, grad), *plain.buffers()))
        torch.testing.assert_close(*results)

    def test_torch_func_in_evaluation(self):
        """Gradients of each sample's loss at once; training would have to write buffers."""
        ce = double(8)
        ce(random_input(4, 8, 5, 5))
        ce.eval()
        x = random_input(3, 1, 8, 4, 4, seed=1)

        def loss(parameters, sample):
            return torch.func.functional_call(ce, parameters, (sample, )).square().sum()

        parameters = dict(ce.named_parameters())
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
        with pytest.raises(ValueError, match='CE expects') as error:
            CE(8)(torch.zeros(shape))
        assert str(shape) in str(error.value)
        assert '8' in str(error.value)
