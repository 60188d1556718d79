"""IterNorm and DBN: what they whiten, their gradients, statistics and bad input."""
import pytest
import torch
from conftest import HALF
from helpers.layers import check_gradients, random_input, same_state, state
from torch import nn

from cenet_mmdet import DBN, IterNorm

each_layer = pytest.mark.parametrize('layer', [IterNorm, DBN])
both_modes = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


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


def expected_whitening(norm, x):
    """The whitening matrices of both papers, by eigendecomposition."""
    d = norm.group_size
    sigma = torch.stack([torch.cov(group, correction=0) + norm.eps * torch.eye(d)
                         for group in group_pixels(x, d)])
    if isinstance(norm, DBN):
        return eigen_function(sigma, torch.rsqrt)
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return eigen_function(sigma / trace, lambda s: newton_gain(s, norm.num_iters)) / trace.sqrt()


class TestWhitening:

    @pytest.mark.parametrize(('layer', 'options'), [
        (IterNorm, dict(num_iters=1)), (IterNorm, dict(num_iters=3)), (IterNorm, {}), (DBN, {})],
        ids=str)
    def test_output_by_definition(self, layer, options):
        """gamma * W (x - mean) + beta, all of it."""
        norm = layer(8, group_size=4, eps=1e-3, dtype=torch.float64, **options)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x = correlated_input(4, 8, 6, 5)
        pixels = group_pixels(x, 4)
        centred = pixels - pixels.mean(-1, keepdim=True)
        white = (expected_whitening(norm, x) @ centred).reshape(8, -1)
        expected = norm.weight[:, None] * white + norm.bias[:, None]
        torch.testing.assert_close(norm(x).transpose(0, 1).reshape(8, -1), expected)

    @pytest.mark.parametrize(('layer', 'options'), [(IterNorm, dict(num_iters=1)), (DBN, {})])
    def test_one_channel_per_group_is_batch_norm(self, layer, options):
        ours, batch_norm = layer(6, group_size=1, **options).double(), nn.BatchNorm2d(6).double()
        for norm in (ours, batch_norm):
            norm.weight.data = torch.linspace(-1, 2, 6, dtype=torch.float64)
            norm.bias.data = torch.linspace(3, -1, 6, dtype=torch.float64)
        x = correlated_input(4, 6, 6, 5)
        torch.testing.assert_close(ours(x), batch_norm(x))


class TestGradients:

    @each_layer
    @both_modes
    def test_gradcheck(self, layer, training):
        norm = layer(4, group_size=2, dtype=torch.float64)
        nn.init.normal_(norm.weight)
        norm(correlated_input(4, 4, 5, 5, seed=1))  # statistics that are not the initial ones
        check_gradients(norm.train(training), correlated_input(2, 4, 1, 3))

    @pytest.mark.parametrize('spread', [0, 1e-12, 1e-7, 1e-3])
    def test_dbn_gradcheck_with_equal_eigenvalues(self, spread):
        """Where autograd's gradient of eigh is not finite."""
        scale = 1 + spread * torch.arange(3, dtype=torch.float64)
        check_gradients(DBN(3, affine=False), white_input() * scale)

    def test_single_precision_gradient_of_white_features(self):
        x = white_input(torch.float32).repeat(8, 1)
        x += 1e-6 * random_input(*x.shape, dtype=torch.float32)
        weights = random_input(*x.shape)

        def gradient(x):
            x = x.clone().requires_grad_()
            return torch.autograd.grad((DBN(3)(x) * weights.to(x.dtype)).sum(), x)[0]

        torch.testing.assert_close(gradient(x).double(), gradient(x.double()), rtol=0, atol=1e-5)

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
        assert set(norm.state_dict()) == {'weight', 'bias', 'running_mean', 'running_whitening',
                                          'num_batches_tracked'}
        mean, whitening = torch.zeros(8).double(), torch.eye(4).double().expand(2, 4, 4)
        for seed in range(2):
            x = correlated_input(4, 8, 6, 5, seed=seed)
            norm(x)
            mean = 0.7 * mean + 0.3 * x.mean((0, 2, 3))
            whitening = 0.7 * whitening + 0.3 * expected_whitening(norm, x)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_whitening, whitening)
        assert norm.num_batches_tracked == 2

        norm.eval()
        centred = group_pixels(x - mean.view(-1, 1, 1), 4)
        torch.testing.assert_close(group_pixels(norm(x), 4), whitening @ centred)
        assert norm.num_batches_tracked == 2

    @each_layer
    def test_reset_parameters_makes_it_the_identity_in_evaluation(self, layer):
        norm = layer(8)
        fresh = state(norm)
        nn.init.normal_(norm.weight)
        x = correlated_input(4, 8, 6, 5, dtype=torch.float32)
        norm(x)
        norm.reset_parameters()
        assert same_state(fresh, norm)
        torch.testing.assert_close(norm.eval()(x), x)


class TestInput:

    @each_layer
    @both_modes
    def test_without_affine(self, layer, training):
        plain, affine = layer(8, affine=False).train(training), layer(8).train(training)
        assert not list(plain.parameters())
        assert plain.weight is None and plain.bias is None
        x = correlated_input(4, 8, 6, 5, dtype=torch.float32)
        assert torch.equal(plain(x), affine(x))

    @each_layer
    @pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
    @both_modes
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
class TestErrors:

    @pytest.mark.parametrize('shape', [(8, ), (2, 4), (2, 4, 3, 3)])
    def test_wrong_channels(self, layer, shape):
        with pytest.raises(ValueError, match=rf'{layer.__name__} expects \(N, 8\).*got \('):
            layer(8)(torch.zeros(shape))

    @pytest.mark.parametrize('shape', [(1, 8), (1, 8, 1), (1, 8, 1, 1)])
    def test_one_value_per_channel(self, layer, shape):
        with pytest.raises(ValueError, match='more than one value per channel'):
            layer(8)(torch.zeros(shape))
        layer(8).eval()(torch.zeros(shape))

    @pytest.mark.parametrize(('name', 'value'), [
        ('num_features', 0), ('num_features', 8.), ('group_size', 0), ('eps', 0.),
        ('eps', float('inf')), ('momentum', 1.5), ('momentum', -0.1)])
    def test_bad_arguments(self, layer, name, value):
        with pytest.raises(ValueError, match=name):
            layer(**{'num_features': 8, name: value})


def test_bad_iterations():
    with pytest.raises(ValueError, match='num_iters'):
        IterNorm(8, num_iters=0)
