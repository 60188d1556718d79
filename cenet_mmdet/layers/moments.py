"""Step 1 of a CE layer: moments of the feature map.

This is one of the two places that read the feature map (`apply.py` is the
other). Means and sums of squares are taken per sample about the sample's own
mean and combined over the batch afterwards (Chan et al., 1983). E[x^2] - E[x]^2
would lose all digits of an inhibited channel, whose offset is far larger than
its deviation. Both functions keep nothing for the backward pass but the
feature map itself, which the network holds anyway.

Deviations are never written out for a whole feature map: on the CPU they are made of
pieces that fit the cache, since fresh memory costs several times the arithmetic.
"""
from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function

from ..compat import is_compiling
from .nonfinite import nonfinite_samples

CACHE = 2 << 20  # bytes of deviations at a time, on the CPU


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
    where it has no IR branch. The counts are scalar tensors: which samples are
    finite is known on the device only.
    """
    pixels: Tensor  # N * L, of the finite samples, summed over the ranks
    mean: Optional[Tensor]  # (G, d)
    scatter: Optional[Tensor]  # (G, d, d), about the mean
    samples: Tensor  # those with a variance: the finite ones, or 0 where L = 1
    variance: Optional[Tensor]  # (G, d), mean of v_n over these samples


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32 for half precision input, float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(x: Tensor) -> Tuple[Moments, Tensor]:
    """Means and scatter matrices of every sample and group of x (N, G, d, L); and x.

    The x returned is for step 4, and for nothing else: its gradient comes back through
    here, where that of the moments is added to it in place.
    """
    n, groups, d, pixels = x.shape
    mean, scatter, passed = _CentredScatter.apply(x.reshape(n * groups, d, pixels))
    per_sample = Moments(pixels, mean.view(n, groups, d), scatter.view(n, groups, d, d))
    return per_sample, passed.view(x.shape)


def pool(per_sample: Optional[Moments], variance: Optional[Tensor], pixels: int) -> BatchMoments:
    """Moments of the batch from those of its samples.

    The samples' scatter matrices and the scatter of their means about the
    batch mean add up to the scatter of the whole batch. Samples with inf or
    NaN are left out.

    Args:
        per_sample: moments of each sample, None without a BD branch.
        variance: v_n, (N, G, d), None without an IR branch.
        pixels: L, pixels of each sample.
    """
    deviations = per_sample.variance() if variance is None else variance
    bad = nonfinite_samples(deviations).view(-1, 1, 1)
    samples = (~bad).sum().to(deviations.dtype)
    mean = scatter = None
    if per_sample is not None:
        mean = per_sample.mean.masked_fill(bad, 0).sum(0) / at_least_one(samples)
        between = (per_sample.mean - mean).masked_fill(bad, 0).permute(1, 2, 0)  # (G, d, N)
        within = per_sample.scatter.masked_fill(bad.unsqueeze(-1), 0).sum(0)
        scatter = torch.baddbmm(within, between, between.mT, alpha=pixels)
    if variance is not None:
        variance = variance.masked_fill(bad, 0).sum(0) / at_least_one(samples)
    return BatchMoments(samples * pixels, mean, scatter, samples * (pixels > 1), variance)


def instance_variance(x: Tensor) -> Tensor:
    """What the variance of `moments(x)` is, without the products: (N, G, d, L) -> (N, G, d)."""
    _, squares = _CentredSquares.apply(x.flatten(0, 2))
    return _unbiased(squares, x.shape[-1]).view(x.shape[:3])


@torch.no_grad()
def track(running: Tensor, new: Tensor, weight: float, pixels: Tensor) -> None:
    """running = (1 - weight) * running + weight * new, unless there was nothing in the batch."""
    new = new.view(running.shape).to(running.dtype)
    running.lerp_(torch.where(pixels > 0, new, running), weight)


def at_least_one(count: Union[int, Tensor]) -> Union[int, Tensor]:
    """The count as a divisor: sums over nothing are 0, and so shall be their means."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _unbiased(squares: Tensor, pixels: int) -> Tensor:
    """Sums of squared deviations to variances; one pixel has none, and gets 0."""
    return squares / at_least_one(pixels - 1)


def _mean(x: Tensor) -> Tensor:
    """Mean over the pixels, 0 where there are none."""
    return x.sum(-1, dtype=statistics_dtype(x.dtype)) / at_least_one(x.shape[-1])


def _pieces(x: Tensor, dim: int) -> Tuple[Tensor, ...]:
    """x cut along `dim` into pieces that fit the cache of a CPU."""
    length = _piece(x, dim)
    return x.split(length, dim) if length else (x, )


def _piece(x: Tensor, dim: int) -> Optional[int]:
    """Length of such pieces along `dim`; None on a GPU and for compilers, to leave x whole."""
    if x.device.type != 'cpu' or is_compiling():
        return None
    size = x.numel() * statistics_dtype(x.dtype).itemsize
    return at_least_one(x.shape[dim] * CACHE // at_least_one(size))


def _scatter(x: Tensor, mean: Tensor) -> Tensor:
    """Sum over the pixels of (x - mean)(x - mean)^T, (B, d, d), in pieces of pixels too."""
    total = None
    for pixels in _pieces(x, dim=-1):
        centred = pixels - mean.unsqueeze(-1)
        product = centred @ centred.mT
        total = product if total is None else total.add_(product)
    return total


class _CentredScatter(Function):
    """x (B, d, L) -> mean (B, d), scatter (B, d, d), by one batched product; and x."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        parts = []
        for rows in _pieces(x, dim=0):
            mean = _mean(rows)
            parts.append((mean, _scatter(rows, mean)))
        mean, scatter = (torch.cat(part) for part in zip(*parts))
        return mean, scatter, x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_scatter: Tensor, grad_x: Tensor) -> Tensor:
        # d scatter has no part through the mean: the deviations sum to zero.
        # grad_x += (grad_scatter + grad_scatter^T)(x - mean) + grad_mean / L
        x, mean = ctx.saved_tensors
        symmetric = grad_scatter + grad_scatter.mT
        constant = (grad_mean.unsqueeze(-1) / at_least_one(x.shape[-1])
                    - symmetric @ mean.unsqueeze(-1))
        if torch.is_grad_enabled():  # for a second derivative
            return grad_x + torch.baddbmm(constant, symmetric, x.to(symmetric.dtype)).to(x.dtype)
        # grad_x was made for this by step 4, and nobody else has it.
        step = _piece(x, dim=0) or at_least_one(len(x))
        for total, s, c, rows in zip(*(t.split(step) for t in (grad_x, symmetric, constant, x))):
            if total.dtype == s.dtype:
                total.baddbmm_(s, rows).add_(c)
            else:
                total.add_(torch.baddbmm(c, s, rows.to(s.dtype)))
        return grad_x


class _CentredSquares(Function):
    """x (..., L) -> mean (...), sum over the pixels of (x - mean)^2 (...)."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tuple[Tensor, Tensor]:
        parts = []
        for rows in _pieces(x, dim=0):
            mean = _mean(rows)
            # A norm is one pass; torch.var over the pixels is several times slower on CPU.
            deviation = torch.linalg.vector_norm(rows - mean.unsqueeze(-1), dim=-1)
            parts.append((mean, deviation.square()))
        return tuple(torch.cat(part) for part in zip(*parts))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_squares: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        constant = grad_mean / at_least_one(x.shape[-1]) - 2 * grad_squares * mean
        grad_x = torch.addcmul(constant.unsqueeze(-1), 2 * grad_squares.unsqueeze(-1), x)
        return grad_x.to(x.dtype)
