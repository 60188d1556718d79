"""Step 1 of a CE layer: moments of the feature map, over its samples and over the batch.

Means and products are taken about each sample's own mean, and combined over the batch afterwards
(Chan et al., 1983). E[x^2] - E[x]^2 would lose all digits of an inhibited channel, whose mean is
far larger than its deviation. Nothing is kept for the backward pass but the feature map itself,
which the network holds anyway.

On a CPU, deviations are computed in pieces that fit the cache: fresh memory for a whole feature
map costs several times the arithmetic.
"""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function

from ...utils.compat import is_compiling

CACHE = 2 << 20  # bytes of deviations at a time, on a CPU


class BatchMoments(NamedTuple):
    """Moments over all samples and pixels of a grouped feature map (N, G, d, L).

    `mean` and `covariance` are None in a layer without BD. The counts are tensors where ranks
    share them, and plain numbers on one process.
    """
    pixels: Union[int, Tensor]  # N * L
    samples: Union[int, Tensor]  # that have a variance: N, or 0 where L = 1
    mean: Optional[Tensor]  # (G, d)
    covariance: Optional[Tensor]  # (G, d, d), biased
    variance: Tensor  # v_n, (N, G, d), unbiased, 0 where L = 1; over the ranks their mean, (G, d)


def batch_moments(x: Tensor) -> BatchMoments:
    """Step 1: moments of x (N, G, d, L)."""
    return with_batch_moments(x)[1]


def with_batch_moments(x: Tensor) -> Tuple[Tensor, BatchMoments]:
    """Step 1: x (N, G, d, L) itself, for step 4, and its moments.

    The gradient that step 4 has for this x arrives with those of the moments, which add it to
    theirs in place. Autograd would add the two in fresh memory, a fifth of CE's time on a CPU.
    """
    x, mean, covariance, variance, _ = _BatchMoments.apply(x)
    return x, _counted(x, mean, covariance, variance)


def instance_moments(x: Tensor) -> BatchMoments:
    """Step 1 in a layer without BD: the variances of x (N, G, d, L) alone."""
    return _counted(x, None, None, instance_variance(x))


def _counted(x: Tensor, mean: Optional[Tensor], covariance: Optional[Tensor],
             variance: Tensor) -> BatchMoments:
    n, pixels = len(x), x.shape[-1]
    return BatchMoments(n * pixels, n if pixels > 1 else 0, mean, covariance, variance)


def instance_variance(x: Tensor) -> Tensor:
    """v_n without the products of the covariance: (N, G, d, L) -> (N, G, d)."""
    squares = _CentredSquares.apply(x.flatten(0, 2))
    return squares.view(x.shape[:3]) / safe_count(x.shape[-1] - 1)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32 for half precision input, float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def safe_count(count: Any) -> Any:
    """The count, an int or a tensor, as a divisor: a mean over nothing is 0, as the sum is."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def safe_mean(x: Tensor, dim: int) -> Tensor:
    """Mean over one dimension, 0 where it is empty."""
    dtype = statistics_dtype(x.dtype)
    return x.mean(dim, dtype=dtype) if x.shape[dim] else x.sum(dim, dtype=dtype)


def centred_scatter(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean, and sum over the pixels of (x - mean)(x - mean)^T: (B, d, L) -> (B, d), (B, d, d)."""
    means: List[Tensor] = []
    scatters: List[Tensor] = []
    for rows in _pieces(x, dim=0):
        mean, total = safe_mean(rows, -1), None
        for pixels in _pieces(rows, dim=-1):
            centred = pixels - mean.unsqueeze(-1)
            product = centred @ centred.mT
            total = product if total is None else total.add_(product)
        means.append(mean)
        scatters.append(total)
    return _joined(means), _joined(scatters)


def _pieces(x: Tensor, dim: int) -> Sequence[Tensor]:
    """x cut along `dim` into pieces that fit the cache of a CPU."""
    if x.device.type != 'cpu' or is_compiling():
        return (x, )
    size = safe_count(x.numel() * statistics_dtype(x.dtype).itemsize)
    length = safe_count(x.shape[dim] * CACHE // size)
    return (x, ) if length >= x.shape[dim] else x.split(length, dim)


def _joined(pieces: List[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _BatchMoments(Function):
    """x (N, G, d, L) -> x; mean, covariance and v_n of BatchMoments; means of the samples."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, ...]:
        n, pixels = len(x), x.shape[-1]
        means, scatter = (moment.unflatten(0, x.shape[:2])
                          for moment in centred_scatter(x.flatten(0, 1)))
        # Sigma = (sum of S_n) / (N L) + (sum of (mean_n - mean)(mean_n - mean)^T) / N
        mean = safe_mean(means, 0)
        between = (means - mean).permute(1, 2, 0)  # (G, d, N)
        covariance = torch.baddbmm(scatter.sum(0), between, between.mT,
                                   beta=1 / safe_count(n * pixels), alpha=1 / safe_count(n))
        variance = scatter.diagonal(dim1=-2, dim2=-1) / safe_count(pixels - 1)
        return x.view_as(x), mean, covariance, variance, means

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: Any) -> None:
        _, mean, _, _, means = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(means)
        ctx.save_for_backward(inputs[0], mean, means)

    @staticmethod
    def backward(ctx: Any, grad_x: Optional[Tensor], *grads: Optional[Tensor]) -> Tensor:
        # Neither second moment has a part through its mean: the deviations sum to zero. With
        # A = (grad_covariance + grad_covariance^T) / (N L) and b_n = 2 grad_variance / (L - 1),
        # grad_x += A (x - mean) + diag(b_n) (x - mean_n) + grad_mean / (N L)
        x, mean, means = ctx.saved_tensors
        grad_mean, grad_covariance, grad_variance = (
            mean.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, (
                mean.shape, (*mean.shape, mean.shape[-1]), means.shape)))
        if torch.is_grad_enabled():  # for a second derivative
            means = safe_mean(x, -1)
        count = safe_count(len(x) * x.shape[-1])
        a = (grad_covariance + grad_covariance.mT) / count
        b = grad_variance * (2 / safe_count(x.shape[-1] - 1))
        constant = torch.baddbmm(grad_mean.unsqueeze(-1), a, mean.unsqueeze(-1),
                                 beta=1 / count, alpha=-1).squeeze(-1)
        constant = torch.addcmul(constant, b, means, value=-1).flatten(0, 1).unsqueeze(-1)
        matrix = (torch.diag_embed(b) + a).flatten(0, 1)
        rows = x.flatten(0, 1).to(matrix.dtype)
        out = torch.baddbmm(constant, matrix, rows)
        if grad_x is not None:
            out.add_(grad_x.flatten(0, 1))
        return out.view(x.shape).to(x.dtype)


class _CentredSquares(Function):
    """x (B, L) -> sum over the pixels of (x - mean)^2, (B, )."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # A norm is one pass; torch.var over the pixels is several times slower on a CPU.
        norms = [torch.linalg.vector_norm(rows - safe_mean(rows, -1).unsqueeze(-1), dim=-1)
                 for rows in _pieces(x, dim=0)]
        return _joined(norms).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # grad_x = 2 grad (x - mean)
        x, = ctx.saved_tensors
        twice = 2 * grad
        constant = -twice * safe_mean(x, -1)
        return torch.addcmul(constant.unsqueeze(-1), twice.unsqueeze(-1), x).to(x.dtype)
