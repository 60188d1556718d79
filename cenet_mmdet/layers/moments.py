"""Step 1 of a CE layer: moments of the feature map.

This is one of the two places that read the feature map (`apply.py` is the
other). Means and sums of squares are taken per sample about the sample's own
mean and combined over the batch afterwards (Chan et al., 1983). E[x^2] - E[x]^2
would lose all digits of an inhibited channel, whose offset is far larger than
its deviation. Both functions keep nothing for the backward pass but the
feature map itself, which the network holds anyway.
"""
from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function


class Moments(NamedTuple):
    """Per-sample moments of a grouped feature map (N, G, d, L), L pixels each."""
    pixels: int  # L
    mean: Tensor  # (N, G, d)
    scatter: Tensor  # (N, G, d, d), sum over pixels of (x - mean)(x - mean)^T

    def variance(self) -> Tensor:
        """Unbiased variance of each sample's channels: (N, G, d)."""
        return _unbiased(self.scatter.diagonal(dim1=-2, dim2=-1), self.pixels)


class BatchMoments(NamedTuple):
    """Moments over all samples and pixels of a batch, on one process or on many.

    `mean` and `scatter` are None where a layer has no BD branch, `variance`
    where it has no IR branch. The counts are tensors after an all-reduce.
    """
    pixels: Union[int, Tensor]  # N * L, summed over the ranks
    mean: Optional[Tensor]  # (G, d)
    scatter: Optional[Tensor]  # (G, d, d), about the mean
    samples: Union[int, Tensor]  # those with a variance: N, or 0 where L = 1
    variance: Optional[Tensor]  # mean of v_n over these samples and all channels


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32 for half precision input, float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(x: Tensor) -> Moments:
    """Means and scatter matrices of every sample and group of x (N, G, d, L)."""
    n, groups, d, pixels = x.shape
    mean, scatter = _CentredScatter.apply(x.reshape(n * groups, d, pixels))
    return Moments(pixels, mean.view(n, groups, d), scatter.view(n, groups, d, d))


def pool(per_sample: Optional[Moments], variance: Optional[Tensor], pixels: int) -> BatchMoments:
    """Moments of the batch from those of its samples.

    The samples' scatter matrices and the scatter of their means about the
    batch mean add up to the scatter of the whole batch.

    Args:
        per_sample: moments of each sample, None without a BD branch.
        variance: v_n, (N, G, d), None without an IR branch.
        pixels: L, pixels of each sample.
    """
    samples = len(variance if per_sample is None else per_sample.mean)
    mean = scatter = None
    if per_sample is not None:
        mean = per_sample.mean.sum(0) / max(samples, 1)
        between = (per_sample.mean - mean).permute(1, 2, 0)  # (G, d, N)
        scatter = per_sample.scatter.sum(0) + pixels * between @ between.mT
    if variance is not None:
        variance = variance.sum() / max(variance.numel(), 1)
    return BatchMoments(samples * pixels, mean, scatter, samples if pixels > 1 else 0, variance)


def instance_variance(x: Tensor) -> Tensor:
    """What `moments(x).variance()` is, without the products: (N, G, d, L) -> (N, G, d)."""
    _, squares = _CentredSquares.apply(x)
    return _unbiased(squares, x.shape[-1])


def _unbiased(squares: Tensor, pixels: int) -> Tensor:
    """Sums of squared deviations to variances; one pixel has none, and gets 0."""
    return squares / max(pixels - 1, 1)


def _mean(x: Tensor) -> Tensor:
    """Mean over the pixels, 0 where there are none."""
    return x.sum(-1, dtype=statistics_dtype(x.dtype)) / max(x.shape[-1], 1)


class _CentredScatter(Function):
    """x (B, d, L) -> mean (B, d), scatter (B, d, d), by one batched product."""

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, Tensor]:
        mean = _mean(x)
        centred = x - mean.unsqueeze(-1)
        return mean, centred @ centred.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_scatter: Tensor) -> Tensor:
        # d scatter has no part through the mean: the deviations sum to zero.
        # grad_x = (grad_scatter + grad_scatter^T)(x - mean) + grad_mean / L
        x, mean = ctx.saved_tensors
        symmetric = grad_scatter + grad_scatter.mT
        constant = grad_mean / max(x.shape[-1], 1) - (symmetric @ mean.unsqueeze(-1)).squeeze(-1)
        grad_x = torch.baddbmm(constant.unsqueeze(-1), symmetric, x.to(symmetric.dtype))
        return grad_x.to(x.dtype)


class _CentredSquares(Function):
    """x (..., L) -> mean (...), sum over the pixels of (x - mean)^2 (...)."""

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, Tensor]:
        mean = _mean(x)
        # A norm is one pass; torch.var over the pixels is several times slower on CPU.
        return mean, torch.linalg.vector_norm(x - mean.unsqueeze(-1), dim=-1).square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_squares: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        constant = grad_mean / max(x.shape[-1], 1) - 2 * grad_squares * mean
        grad_x = torch.addcmul(constant.unsqueeze(-1), 2 * grad_squares.unsqueeze(-1), x)
        return grad_x.to(x.dtype)
