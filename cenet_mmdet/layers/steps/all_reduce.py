"""Step 2 of a SyncCE layer: moments summed over the ranks, by one collective each way.

Each rank's share is weighted by the pixels and samples that it holds: averaging the ranks' own
statistics is wrong as soon as they have images of different sizes. One vector carries all that a
layer needs: counts, sums, the upper triangles of the second moments, and the sums of the instance
variances. It is float64, because each rank's covariance is about its own mean, and only float64
brings the parts to a common origin without a loss of digits.
"""
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .moments import BatchMoments, safe_count


def all_reduce(batch: BatchMoments, group=None) -> BatchMoments:
    """The moments of all ranks' batches together; a rank may be empty.

    Args:
        batch: moments of this rank's batch.
        group: process group, None for the default one.

    Returns:
        The same on every rank, to the bit. The counts are tensors. Where all ranks are empty,
        they are 0 and the moments finite.
    """
    return _unpack(_AllReduceSum.apply(_pack(batch), group), like=batch)


class _AllReduceSum(Function):
    """Sum over the ranks. Every rank's loss depends on every share: so is its gradient."""

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
    like = batch.variance if batch.mean is None else batch.mean
    samples = len(batch.variance) if batch.variance is not None and batch.varied else 0
    parts = [like.new_tensor([batch.pixels, samples], dtype=torch.float64)]
    if batch.mean is not None:
        mean = batch.mean.double()
        second = (batch.covariance.double() + _outer(mean))[_upper_triangle(batch.covariance)]
        parts += [batch.pixels * mean.flatten(), batch.pixels * second]
    if batch.variance is not None:
        parts += [batch.variance.double().sum(0).flatten()]
    return torch.cat(parts)


def _unpack(total: Tensor, like: BatchMoments) -> BatchMoments:
    pixels, samples = total[0], total[1]
    mean = covariance = variance = None
    if like.mean is not None:
        channels = like.mean.numel()
        upper = _upper_triangle(like.covariance)
        mean = total[2:2 + channels].view_as(like.mean) / safe_count(pixels)
        triangle = torch.zeros_like(like.covariance, dtype=torch.float64).index_put(
            upper, total[2 + channels:2 + channels + upper[0].numel()] / safe_count(pixels))
        covariance = (triangle + triangle.triu(1).mT - _outer(mean)).to(like.covariance.dtype)
        mean = mean.to(like.mean.dtype)
    if like.variance is not None:
        shape = like.variance.shape[1:]
        variance = total[-shape.numel():].view(shape) / safe_count(samples)
        variance = variance.to(like.variance.dtype)
    return BatchMoments(pixels, mean, covariance, variance, varied=samples > 0)


def _outer(mean: Tensor) -> Tensor:
    """(G, d) -> (G, d, d)."""
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _upper_triangle(matrices: Tensor):
    """Indices of the upper triangles, diagonals included, of (G, d, d)."""
    groups, d, _ = matrices.shape
    rows, columns = torch.triu_indices(d, d, device=matrices.device)
    group = torch.arange(groups, device=matrices.device).repeat_interleave(len(rows))
    return group, rows.repeat(groups), columns.repeat(groups)
