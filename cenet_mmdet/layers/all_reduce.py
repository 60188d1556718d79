"""Step 2 of a SyncCE layer: moments summed over the ranks, by one collective each way.

The ranks' shares are weighted by what they really hold, since averaging
per-rank statistics is wrong as soon as ranks have different image sizes. All
that a layer needs crosses in one vector: counts, sums, the upper triangles of
the second moments, and the sums of the instance variances. It crosses in
float64: each rank's scatter is taken about its own mean (`moments.py`), and
only float64 lets the parts be brought to a common origin without losing the
digits of channels whose mean is large against their deviation.
"""
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .moments import BatchMoments, at_least_one


def all_reduce(batch: BatchMoments, group=None) -> BatchMoments:
    """The moments of the union of all ranks' batches; a rank may be empty.

    Args:
        batch: moments of this rank's batch.
        group: process group, None for the default one.

    Returns:
        The same on every rank, to the bit. Where all ranks are empty the counts are
        0 and the moments finite.
    """
    total = _AllReduceSum.apply(_pack(batch), group)
    return _unpack(total, like=batch)


class _AllReduceSum(Function):
    """Sum over the ranks; so is its gradient, as every rank's loss depends on every share."""

    @staticmethod
    def forward(ctx, share: Tensor, group) -> Tensor:
        ctx.group = group
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllReduceSum.apply(grad.contiguous(), ctx.group), None


def _pack(batch: BatchMoments) -> Tensor:
    """Sums that may be added up: (numbers, ) float64."""
    parts = [torch.stack([batch.pixels, batch.samples]).double()]
    if batch.mean is not None:
        mean = batch.mean.double()
        second = batch.scatter.double() + batch.pixels * _outer(mean)
        parts += [batch.pixels * mean.flatten(), second[_upper_triangle(second)]]
    if batch.variance is not None:
        parts += [batch.samples * batch.variance.double().flatten()]
    return torch.cat(parts)


def _unpack(total: Tensor, like: BatchMoments) -> BatchMoments:
    pixels, samples = total[0], total[1]
    mean = scatter = variance = None
    if like.mean is not None:
        channels = like.mean.numel()
        mean = total[2:2 + channels].view_as(like.mean) / at_least_one(pixels)
        upper = _upper_triangle(like.scatter)
        triangle = torch.zeros_like(like.scatter, dtype=torch.float64).index_put(
            upper, total[2 + channels:2 + channels + upper[0].numel()])
        second = triangle + triangle.triu(1).mT
        scatter = (second - pixels * _outer(mean)).to(like.scatter.dtype)
        mean = mean.to(like.mean.dtype)
    if like.variance is not None:
        variance = total[-like.variance.numel():].view_as(like.variance) / at_least_one(samples)
        variance = variance.to(like.variance.dtype)
    dtype = (like.variance if like.mean is None else like.mean).dtype
    return BatchMoments(pixels.to(dtype), mean, scatter, samples.to(dtype), variance)


def _outer(mean: Tensor) -> Tensor:
    """(G, d) -> (G, d, d)."""
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _upper_triangle(matrices: Tensor):
    """Indices of the upper triangles, diagonals included, of (G, d, d)."""
    groups, d, _ = matrices.shape
    rows, columns = torch.triu_indices(d, d, device=matrices.device)
    group = torch.arange(groups, device=matrices.device).repeat_interleave(len(rows))
    return group, rows.repeat(groups), columns.repeat(groups)
