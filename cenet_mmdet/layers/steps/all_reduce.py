"""Step 2 of a SyncCE layer: moments summed over the ranks, by one collective each way.

Each rank's share is weighted by the pixels and samples that it holds: averaging the ranks' own
statistics is wrong as soon as they have images of different sizes. One vector carries all that a
layer needs: counts, sums, the upper triangles of the second moments, and the sums of the instance
variances. It is float64, because each rank's covariance is about its own mean, and only float64
brings the parts to a common origin without a loss of digits.
"""
from typing import Any, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .moments import BatchMoments, safe_count


def all_reduce(batch: BatchMoments, group: Any = None) -> BatchMoments:
    """The moments of all ranks' batches together; a rank may be empty.

    Args:
        batch: moments of this rank's batch.
        group: process group, None for the default one.

    Returns:
        The same on every rank, to the bit. Where all ranks are empty, the counts are 0 and the
        moments finite.
    """
    return _unpack(_AllReduceSum.apply(_pack(batch), group), like=batch)


class _AllReduceSum(Function):
    """Sum over the ranks. Every rank's loss depends on every share: so is its gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return _AllReduceSum.apply(grad.contiguous(), ctx.group), None


def _pack(batch: BatchMoments) -> Tensor:
    """Sums that may be added up: (numbers, ) float64."""
    counts = batch.variance.new_tensor([batch.pixels, batch.samples], dtype=torch.float64)
    parts = [counts, batch.variance.double().sum(0).flatten()]
    if batch.mean is not None:
        mean = batch.mean.double()
        second = batch.covariance.double() + _outer(mean)
        parts += [batch.pixels * mean.flatten(), batch.pixels * second[_upper_triangle(second)]]
    return torch.cat(parts)


def _unpack(total: Tensor, like: BatchMoments) -> BatchMoments:
    pixels, samples = total[0], total[1]
    shape, dtype = like.variance.shape[1:], like.variance.dtype
    channels = shape.numel()
    _, variance, mean, second = total.split(
        [2, channels, *([channels, len(total) - 2 - 2 * channels] if like.mean is not None
                        else [0, 0])])
    variance = (variance / safe_count(samples)).view(shape).to(dtype)
    if like.mean is None:
        return BatchMoments(pixels, samples, None, None, variance)
    mean, second = (mean / safe_count(pixels)).view(shape), second / safe_count(pixels)
    triangle = torch.zeros_like(like.covariance, dtype=torch.float64).index_put(
        _upper_triangle(like.covariance), second)
    covariance = triangle + triangle.triu(1).mT - _outer(mean)
    return BatchMoments(pixels, samples, mean.to(dtype), covariance.to(dtype), variance)


def _outer(mean: Tensor) -> Tensor:
    """(G, d) -> (G, d, d)."""
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _upper_triangle(matrices: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Indices of the upper triangles, diagonals included, of (G, d, d)."""
    groups, d, _ = matrices.shape
    rows, columns = torch.triu_indices(d, d, device=matrices.device)
    group = torch.arange(groups, device=matrices.device).repeat_interleave(len(rows))
    return group, rows.repeat(groups), columns.repeat(groups)
