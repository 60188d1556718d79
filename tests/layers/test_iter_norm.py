"""IterNorm and DBN: what they whiten, their gradients, statistics and bad input."""
import pytest
import torch
from conftest import HALF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cenet_mmdet.layers.iter_norm import DBN, IterNorm, inverse_root

LAYERS = [IterNorm, DBN]

each_layer = pytest.mark.parametrize('layer', LAYERS)


def random_input(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated_input(n, c, *spatial, seed=0, dtype=torch.float64):
    """Channels that are correlated, of unequal scale and not centred."""
    mixing = random_input(c, c, seed=seed + 100) / c ** 0.5 + torch.eye(c)
    x = torch.einsum('ij,nj...->ni...', mixing, random_input(n, c, *spatial, seed=seed))
    return (x + torch.arange(c).view(-1, *(1, ) * len(spatial))).to(dtype).contiguous()


def white_input(dtype=torch.float64):
    """(4, 3) with the covariance I, to the last digit."""
    return torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=dtype)


def group_pixels(x, d):
    """All pixels of each group: (N, C, ...) -> (G, d, N * L)."""
    return x.transpose(0, 1).reshape(x.shape[1] // d, d, -1)


def batch_covariance(x, d, eps=0.):
    """Covariance of each group by torch.cov: (N, C, ...) -> (G, d, d)."""
    return torch.stack([torch.cov(group, correction=0) + eps * torch.eye(d, dtype=x.dtype)
                        for group in group_pixels(x, d)])


def eigen_function(sigma, function):
    """D f(Lambda) D^T of sigma = D Lambda D^T."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors @ torch.diag_embed(function(values)) @ vectors.mT


def newton_gain(share, iterations):
    """p_T of p <- 1.5 p - 0.5 p^3 l: what T iterations make of an eigenvalue l of sigma_N."""
    p = torch.ones_like(share)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p ** 3 * share
    return p


def trace(sigma):
    return sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def expected_whitening(layer, sigma):
    """The whitening matrices of both papers, by eigendecomposition."""
    if isinstance(layer, DBN):
        return eigen_function(sigma, torch.rsqrt)
    gains = eigen_function(sigma / trace(sigma), lambda s: newton_gain(s, layer.num_iters))
    return gains / trace(sigma).sqrt()


class TestWhitening:

    def test_dbn_whitens(self):
        x = correlated_input(4, 8, 6, 5)
        y = DBN(8, group_size=4, eps=1e-12, affine=False)(x)
        identity = torch.eye(4, dtype=x.dtype).expand(2, 4, 4)
        torch.testing.assert_close(batch_covariance(y, 4), identity, rtol=0, atol=1e-8)
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8, dtype=x.dtype))

    def test_dbn_matrix_is_zca(self):
        """Of all whitening matrices, the symmetric one."""
        x = correlated_input(4, 8, 6, 5)
        whitening = DBN(8, group_size=4, eps=1e-3).whitening_matrix(batch_covariance(x, 4))
        sigma = batch_covariance(x, 4, eps=1e-3)
        torch.testing.assert_close(whitening, eigen_function(sigma, torch.rsqrt))
        torch.testing.assert_close(whitening, whitening.mT)

    @pytest.mark.parametrize('num_iters', [1, 3, 5])
    def test_iternorm_spectrum_is_newtons(self, num_iters):
        """W sigma W^T has the eigenvectors of sigma, and the eigenvalues p_T^2 l."""
        x = correlated_input(4, 8, 6, 5)
        norm = IterNorm(8, group_size=4, num_iters=num_iters, eps=1e-3)
        whitening = norm.whitening_matrix(batch_covariance(x, 4))
        sigma = batch_covariance(x, 4, eps=1e-3)
        expected = eigen_function(sigma / trace(sigma),
                                  lambda share: newton_gain(share, num_iters) ** 2 * share)
        torch.testing.assert_close(whitening @ sigma @ whitening.mT, expected, rtol=0, atol=1e-10)

    def test_iternorm_whitens_with_many_iterations(self):
        x = random_input(4, 8, 6, 5)  # well-conditioned
        y = IterNorm(8, group_size=4, num_iters=12, eps=1e-12, affine=False)(x)
        identity = torch.eye(4, dtype=x.dtype).expand(2, 4, 4)
        torch.testing.assert_close(batch_covariance(y, 4), identity, rtol=0, atol=1e-6)

    def test_five_iterations_are_closer_than_three(self):
        x = correlated_input(4, 16, 6, 5)
        errors = [(batch_covariance(IterNorm(16, num_iters=t, affine=False)(x), 16)
                   - torch.eye(16)).norm() for t in (3, 5, 7)]
        assert errors[0] > errors[1] > errors[2]

    @each_layer
    def test_scale_of_the_input_does_not_matter(self, layer):
        """Unlike CE, which leaves out the trace."""
        norm = layer(8, group_size=4, eps=1e-12)
        x = correlated_input(4, 8, 6, 5)
        torch.testing.assert_close(norm(100 * x), norm(x))

    @each_layer
    def test_one_channel_per_group_is_batch_norm(self, layer):
        options = dict(num_iters=1) if layer is IterNorm else {}
        ours, batch_norm = layer(6, group_size=1, **options).double(), nn.BatchNorm2d(6).double()
        with torch.no_grad():
            for norm in (ours, batch_norm):
                norm.weight.copy_(torch.linspace(-1, 2, 6))
                norm.bias.copy_(torch.linspace(3, -1, 6))
        x = correlated_input(4, 6, 6, 5)
        torch.testing.assert_close(ours(x), batch_norm(x))

    @each_layer
    def test_output_by_definition(self, layer):
        """gamma * W (x - mean) + beta, all of it."""
        norm = layer(8, group_size=4, dtype=torch.float64)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x = correlated_input(4, 8, 6, 5)
        pixels = group_pixels(x, 4)
        whitening = expected_whitening(norm, batch_covariance(x, 4, norm.eps))
        white = (whitening @ (pixels - pixels.mean(-1, keepdim=True))).reshape(8, -1)
        expected = norm.weight[:, None] * white + norm.bias[:, None]
        torch.testing.assert_close(norm(x).transpose(0, 1).reshape(8, -1), expected)


class TestGradients:

    @each_layer
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_gradcheck(self, layer, training):
        """Input and parameters, first and second order."""
        norm = layer(4, group_size=2, dtype=torch.float64)
        norm(correlated_input(4, 4, 5, 5, seed=1))  # statistics that are not the initial ones
        norm.train(training)
        inputs = (correlated_input(2, 4, 1, 3).requires_grad_(),
                  random_input(4, seed=2).requires_grad_(),
                  random_input(4, seed=3).requires_grad_())

        def function(x, weight, bias):
            return torch.func.functional_call(norm, dict(weight=weight, bias=bias), (x, ))

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    @pytest.mark.parametrize('spread', [0, 1e-12, 1e-7, 1e-3])
    def test_dbn_gradcheck_with_equal_eigenvalues(self, spread):
        scale = 1 + spread * torch.arange(3, dtype=torch.float64)
        x = (white_input() * scale).requires_grad_()
        norm = DBN(3, affine=False)
        assert torch.autograd.gradcheck(norm, x)
        assert torch.autograd.gradgradcheck(norm, x)

    def test_gradients_through_eigh_are_not_finite_there(self):
        """Why inverse_root does not leave its gradient to autograd."""
        sigma = torch.eye(3, dtype=torch.float64).requires_grad_()
        weights = random_input(3, 3)
        plain, = torch.autograd.grad((eigen_function(sigma, torch.rsqrt) * weights).sum(), sigma)
        ours, = torch.autograd.grad((inverse_root(sigma, 1e-5) * weights).sum(), sigma)
        assert not torch.isfinite(plain).all()
        torch.testing.assert_close(ours, -0.5 * weights)  # sigma^(-1/2) = I - (sigma - I) / 2

    def test_inverse_root_matches_eigh_where_that_is_fine(self):
        sigma = batch_covariance(correlated_input(4, 8, 6, 5), 4).requires_grad_()
        weights = random_input(2, 4, 4)
        weights = weights + weights.mT  # autograd of eigh treats other gradients differently
        plain, = torch.autograd.grad((eigen_function(sigma, torch.rsqrt) * weights).sum(), sigma)
        ours, = torch.autograd.grad((inverse_root(sigma, 1e-5) * weights).sum(), sigma)
        torch.testing.assert_close(ours, plain)

    def test_single_precision_gradient_of_white_features(self):
        x = white_input(torch.float32).repeat(8, 1)
        x += 1e-6 * random_input(*x.shape, dtype=torch.float32)
        weights = random_input(*x.shape)

        def gradient(x):
            x = x.clone().requires_grad_()
            return torch.autograd.grad((DBN(3)(x) * weights.to(x.dtype)).sum(), x)[0]

        torch.testing.assert_close(gradient(x).double(), gradient(x.double()), rtol=0, atol=1e-5)

    @each_layer
    def test_nothing_of_the_size_of_the_map_is_kept_but_the_input(self, layer):
        norm = layer(32)
        x = correlated_input(2, 32, 24, 24, dtype=torch.float32).requires_grad_()
        kept = set()

        def pack(tensor):
            if tensor.numel() >= x.numel():
                kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            norm(x)
        assert kept == {x.untyped_storage().data_ptr()}

    @each_layer
    def test_training_step_between_eval_forward_and_backward(self, layer):
        """A step that updates the running statistics does not disturb an earlier graph."""
        norm = layer(4, dtype=torch.float64).eval()
        x = correlated_input(2, 4, 3, 3).requires_grad_()
        inputs = [x, *norm.parameters()]
        y = norm(x).square().sum()
        expected = torch.autograd.grad(y, inputs, retain_graph=True)
        norm.train()(x.detach())
        torch.testing.assert_close(torch.autograd.grad(y, inputs), expected)


class TestStatistics:

    @each_layer
    def test_running_statistics_after_two_steps(self, layer):
        norm = layer(8, group_size=4, momentum=0.3, dtype=torch.float64)
        mean = torch.zeros(8, dtype=torch.float64)
        whitening = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
        for seed in range(2):
            x = correlated_input(4, 8, 6, 5, seed=seed)
            norm(x)
            mean = 0.7 * mean + 0.3 * x.mean((0, 2, 3))
            new = expected_whitening(norm, batch_covariance(x, 4, norm.eps))
            whitening = 0.7 * whitening + 0.3 * new
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_whitening, whitening)
        assert norm.num_batches_tracked == 2

        norm.eval()
        centred = group_pixels(x - mean.view(-1, 1, 1), 4)
        torch.testing.assert_close(group_pixels(norm(x), 4), whitening @ centred)
        assert norm.num_batches_tracked == 2

    @each_layer
    def test_untrained_is_identity_in_evaluation(self, layer):
        x = correlated_input(2, 6, 3, 3)
        torch.testing.assert_close(layer(6).eval()(x), x)

    @each_layer
    def test_eval_does_not_depend_on_the_other_samples(self, layer):
        norm = layer(8, dtype=torch.float64)
        norm(correlated_input(4, 8, 6, 5, seed=1))
        norm.eval()
        x = correlated_input(3, 8, 6, 5)
        torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]))

    @each_layer
    def test_state_dict_round_trip(self, layer):
        trained, fresh = layer(8, group_size=4), layer(8, group_size=4)
        nn.init.normal_(trained.weight)
        trained(correlated_input(4, 8, 6, 5, dtype=torch.float32))
        state = trained.state_dict()
        assert set(state) == {'weight', 'bias', 'running_mean', 'running_whitening',
                              'num_batches_tracked'}
        fresh.load_state_dict(state)
        x = correlated_input(2, 8, 3, 3, seed=1, dtype=torch.float32)
        assert torch.equal(trained.eval()(x), fresh.eval()(x))

    @each_layer
    def test_reset_parameters(self, layer):
        norm, fresh = layer(8), layer(8)
        nn.init.normal_(norm.weight)
        norm(correlated_input(4, 8, 6, 5, dtype=torch.float32))
        norm.reset_parameters()
        assert all(torch.equal(norm.state_dict()[k], v) for k, v in fresh.state_dict().items())

    @each_layer
    def test_empty_batch(self, layer):
        norm = layer(8)
        before = {k: v.clone() for k, v in norm.state_dict().items()}
        x = torch.zeros(0, 8, 4, 4, requires_grad=True)
        y = norm(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


class TestInput:

    @each_layer
    @pytest.mark.parametrize('spatial', [(), (5, ), (5, 4), (3, 2, 2)])
    def test_shapes(self, layer, spatial):
        """Pixels are pixels, however they lie: same output as for (N * L, C)."""
        x = correlated_input(6, 8, *spatial)
        flat = x.movedim(1, -1).reshape(-1, 8)
        y = layer(8, group_size=4)(x)
        assert y.shape == x.shape
        torch.testing.assert_close(y.movedim(1, -1).reshape(-1, 8), layer(8, group_size=4)(flat))

    @each_layer
    def test_channels_last(self, layer):
        x = correlated_input(2, 8, 5, 4)
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(8)(last), layer(8)(x))

    @each_layer
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_without_affine(self, layer, training):
        plain, affine = layer(8, affine=False).train(training), layer(8).train(training)
        assert not list(plain.parameters())
        assert plain.weight is None and plain.bias is None
        x = correlated_input(4, 8, 6, 5, dtype=torch.float32)
        assert torch.equal(plain(x), affine(x))

    @each_layer
    @pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_half_precision(self, layer, dtype, training):
        """Output of the input's type, float32 statistics, float32's values up to rounding."""
        norm, reference = layer(8).train(training), layer(8).train(training)
        x = correlated_input(4, 8, 6, 5).to(dtype).requires_grad_()
        with torch.autocast('cpu', dtype):
            y = norm(x)
        y.sum().backward()
        expected = reference(x.detach().float())
        assert y.dtype == x.grad.dtype == dtype
        assert norm.running_whitening.dtype == norm.weight.grad.dtype == torch.float32
        torch.testing.assert_close(norm.running_whitening, reference.running_whitening)
        # W x is rounded before centring, and reaches 8 to 16 here.
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)

    @each_layer
    def test_half_precision_does_not_move_the_mean(self, layer):
        """An offset meets the same rounded matrix in the product and in the shift."""
        x = (correlated_input(8, 8, 20, 20) + 50).bfloat16()
        mean = layer(8)(x).float().mean((0, 2, 3))
        # An error of W by one part in 256, applied to 50, would be 0.2.
        assert mean.abs().max() < 0.05

    @each_layer
    def test_half_precision_model(self, layer):
        norm = layer(8).bfloat16()
        y = norm(correlated_input(4, 8, 6, 5, dtype=torch.bfloat16))
        assert y.dtype == norm.running_whitening.dtype == torch.bfloat16
        assert torch.isfinite(norm.running_whitening).all()

    @each_layer
    @pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
    def test_duplicate_and_constant_channels_stay_finite(self, layer, scale):
        """A singular covariance, also where float32 rounds its eigenvalues below 0."""
        x = scale * correlated_input(4, 8, 6, 5, dtype=torch.float32)
        x[:, 1] = x[:, 0]
        x[:, 2] = 3 * scale
        x.requires_grad_()
        norm = layer(8)
        y = norm(x)
        (y * random_input(*y.shape, dtype=torch.float32)).sum().backward()
        for values in (y, x.grad, norm.running_whitening, norm.weight.grad):
            assert torch.isfinite(values).all()
        assert y.abs().max() < 100

    @each_layer
    def test_fewer_values_than_channels(self, layer):
        y = layer(16)(correlated_input(2, 16, dtype=torch.float32))
        assert torch.isfinite(y).all()

    @settings(max_examples=20, deadline=None)
    @given(layer=st.sampled_from(LAYERS), n=st.integers(1, 4), c=st.integers(1, 24),
           h=st.integers(1, 4), w=st.integers(1, 4), group_size=st.integers(1, 16),
           training=st.booleans(), scale=st.sampled_from([1e-6, 1., 1e4]))
    def test_finite_for_all_shapes(self, layer, n, c, h, w, group_size, training, scale):
        norm = layer(c, group_size=group_size).train(training and n * h * w > 1)
        assert c % norm.group_size == 0 and norm.group_size <= group_size
        x = (scale * random_input(n, c, h, w, dtype=torch.float32)).requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        assert y.shape == x.shape
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


class TestErrors:

    @each_layer
    @pytest.mark.parametrize('shape', [(8, ), (2, 4), (2, 4, 3, 3)])
    def test_wrong_channels(self, layer, shape):
        with pytest.raises(ValueError, match=rf'{layer.__name__} expects \(N, 8\).*got \('):
            layer(8)(torch.zeros(shape))

    @each_layer
    @pytest.mark.parametrize('shape', [(1, 8), (1, 8, 1), (1, 8, 1, 1)])
    def test_one_value_per_channel(self, layer, shape):
        with pytest.raises(ValueError, match='more than one value per channel'):
            layer(8)(torch.zeros(shape))
        layer(8).eval()(torch.zeros(shape))

    @each_layer
    @pytest.mark.parametrize('arguments', [
        dict(num_features=0), dict(num_features=8.), dict(group_size=0), dict(eps=0.),
        dict(eps=float('inf')), dict(momentum=1.5), dict(momentum=-0.1)], ids=str)
    def test_bad_arguments(self, layer, arguments):
        name, = arguments
        with pytest.raises(ValueError, match=name):
            layer(**{'num_features': 8, **arguments})

    def test_bad_iterations(self):
        with pytest.raises(ValueError, match='num_iters'):
            IterNorm(8, num_iters=0)


class TestDropIn:

    @each_layer
    def test_group_size_is_halved_until_it_divides(self, layer):
        assert layer(24, group_size=16).group_size == 8
        assert layer(24, group_size=None).group_size == 24
        assert 'group_size=8' in repr(layer(24, group_size=16))

    @each_layer
    def test_named_as_batch_norm(self, layer):
        """MMCV calls the layers of a ResNet bn1, bn2, ..., as in its checkpoints."""
        infer_abbr = pytest.importorskip('mmcv.cnn.bricks.norm').infer_abbr
        assert infer_abbr(layer) == 'bn'
