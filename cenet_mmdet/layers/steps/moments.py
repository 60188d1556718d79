"""Steps 1 and 2 of a CE layer: moments of the feature map, of each sample and of the batch.

Means and sums of squares are taken about each sample's own mean, and combined over the batch
afterwards (Chan et al., 1983). E[x^2] - E[x]^2 would lose all digits of an inhibited channel,
whose mean is far larger than its deviation. Nothing is kept for the backward pass but the feature
map itself, which the network holds anyway.

On a CPU, deviations are computed in pieces that fit the cache: fresh memory for a whole feature
map costs several times the arithmetic.
"""
from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function

from ...utils.compat import is_compiling

CACHE = 2 << 20  # bytes of deviations at a time, on a CPU


class InstanceMoments(NamedTuple):
    """Moments of each sample of a grouped feature map (N, G, d, L).

    `mean` and `scatter` are None in a layer without BD, `variance` in a layer without IR.
    """
    pixels: int  # L
    mean: Optional[Tensor]  # (N, G, d)
    scatter: Optional[Tensor]  # (N, G, d, d), sum over the pixels of (x - mean)(x - mean)^T
    variance: Optional[Tensor]  # v_n, (N, G, d), unbiased; 0 where L = 1


class BatchMoments(NamedTuple):
    """Moments over all samples and pixels of a batch, of one process or of all ranks.

    `mean` and `covariance` are None in a layer without BD. The counts are tensors where ranks
    share them, and plain numbers on one process.
    """
    pixels: Union[int, Tensor]  # N * L
    samples: Union[int, Tensor]  # that have a variance: N, or 0 where L = 1
    mean: Optional[Tensor]  # (G, d)
    covariance: Optional[Tensor]  # (G, d, d), biased
    variance: Optional[Tensor]  # mean of v_n over all ranks, (G, d); None on one process


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32 for half precision input, float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def instance_moments(x: Tensor, has_bd: bool, has_ir: bool) -> InstanceMoments:
    """Step 1: moments of each sample and group of x (N, G, d, L)."""
    n, groups, d, pixels = x.shape
    if not has_bd:
        return InstanceMoments(pixels, None, None, instance_variance(x))
    mean, scatter = _CentredScatter.apply(x.reshape(n * groups, d, pixels))
    mean, scatter = mean.view(n, groups, d), scatter.view(n, groups, d, d)
    variance = None
    if has_ir:
        variance = scatter.diagonal(dim1=-2, dim2=-1) / safe_count(pixels - 1)
    return InstanceMoments(pixels, mean, scatter, variance)


def instance_variance(x: Tensor) -> Tensor:
    """The variance in `instance_moments(x)` without the products: (N, G, d, L) -> (N, G, d)."""
    squares = _CentredSquares.apply(x.flatten(0, 2))
    return squares.view(x.shape[:3]) / safe_count(x.shape[-1] - 1)


def batch_moments(samples: InstanceMoments) -> BatchMoments:
    """Step 2 on one process; the mean of v_n is left to step 3.

    The samples' scatter matrices, and the scatter of their means about the batch mean, add up to
    the scatter of the batch:

        Sigma = (sum of S_n) / (N L) + (sum of (mean_n - mean)(mean_n - mean)^T) / N
    """
    mean = covariance = None
    n = len(samples.variance if samples.mean is None else samples.mean)
    pixels = n * samples.pixels
    if samples.mean is not None:
        mean = safe_mean(samples.mean, 0)
        between = (samples.mean - mean).permute(1, 2, 0)  # (G, d, N)
        covariance = torch.baddbmm(samples.scatter.sum(0), between, between.mT,
                                   beta=1 / safe_count(pixels), alpha=1 / safe_count(n))
    return BatchMoments(pixels, n if samples.pixels > 1 else 0, mean, covariance, None)


def safe_count(count: Union[int, Tensor]) -> Union[int, Tensor]:
    """The count as a divisor: a mean over nothing is 0, as the sum is."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def safe_mean(x: Tensor, dim: int) -> Tensor:
    """Mean over one dimension, 0 where it is empty."""
    dtype = statistics_dtype(x.dtype)
    return x.mean(dim, dtype=dtype) if x.shape[dim] else x.sum(dim, dtype=dtype)


def _pieces(x: Tensor, dim: int) -> Tuple[Tensor, ...]:
    """x cut along `dim` into pieces that fit the cache of a CPU."""
    if x.device.type != 'cpu' or is_compiling():
        return (x, )
    size = safe_count(x.numel() * statistics_dtype(x.dtype).itemsize)
    length = safe_count(x.shape[dim] * CACHE // size)
    return (x, ) if length >= x.shape[dim] else x.split(length, dim)


def _joined(pieces) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _scatter(x: Tensor, mean: Tensor) -> Tensor:
    """Sum over the pixels of (x - mean)(x - mean)^T: (B, d, L) -> (B, d, d)."""
    total = None
    for pixels in _pieces(x, dim=-1):
        centred = pixels - mean.unsqueeze(-1)
        product = centred @ centred.mT
        total = product if total is None else total.add_(product)
    return total


class _CentredScatter(Function):
    """x (B, d, L) -> mean (B, d), scatter (B, d, d), by one batched product."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, Tensor]:
        means, scatters = [], []
        for rows in _pieces(x, dim=0):
            means.append(safe_mean(rows, -1))
            scatters.append(_scatter(rows, means[-1]))
        return _joined(means), _joined(scatters)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_scatter: Tensor) -> Tensor:
        # d scatter has no part through the mean: the deviations sum to zero.
        # grad_x = (grad_scatter + grad_scatter^T)(x - mean) + grad_mean / L
        x, mean = ctx.saved_tensors
        symmetric = grad_scatter + grad_scatter.mT
        constant = torch.baddbmm(grad_mean.unsqueeze(-1), symmetric, mean.unsqueeze(-1),
                                 beta=1 / safe_count(x.shape[-1]), alpha=-1)
        return torch.baddbmm(constant, symmetric, x.to(symmetric.dtype)).to(x.dtype)


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
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # grad_x = 2 grad (x - mean)
        x, = ctx.saved_tensors
        twice = 2 * grad
        return torch.addcmul((-twice * safe_mean(x, -1)).unsqueeze(-1), twice.unsqueeze(-1), x).to(x.dtype)
