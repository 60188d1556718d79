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

from .moments import BatchMoments, InstanceMoments, batch_moments, safe_count


def all_reduce(samples: InstanceMoments, group=None) -> BatchMoments:
    """The moments of all ranks' batches together; a rank may be empty.

    Args:
        samples: moments of this rank's samples.
        group: process group, None for the default one.

    Returns:
        The same on every rank, to the bit. Where all ranks are empty, the counts are 0 and the
        moments finite.
    """
    batch = batch_moments(samples)
    total = _AllReduceSum.apply(_pack(batch, samples), group)
    return _unpack(total, batch, samples)


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


def _pack(batch: BatchMoments, samples: InstanceMoments) -> Tensor:
    """Sums that may be added up: (numbers, ) float64."""
    mean, covariance, variance = batch.mean, batch.covariance, samples.variance
    like = variance if mean is None else mean
    parts = [like.new_tensor([batch.pixels, batch.samples], dtype=torch.float64)]
    if mean is not None:
        second = covariance.double() + _outer(mean.double())
        parts += [batch.pixels * mean.double().flatten(),
                  batch.pixels * second[_upper_triangle(second)]]
    if variance is not None:
        parts += [variance.double().sum(0).flatten()]
    return torch.cat(parts)


def _unpack(total: Tensor, batch: BatchMoments, samples: InstanceMoments) -> BatchMoments:
    pixels, with_variance = total[0], total[1]
    mean, covariance, variance = batch.mean, batch.covariance, samples.variance
    if mean is not None:
        channels = mean.numel()
        upper = _upper_triangle(covariance)
        exact = total[2:2 + channels].view_as(mean) / safe_count(pixels)
        triangle = torch.zeros_like(covariance, dtype=torch.float64).index_put(
            upper, total[2 + channels:2 + channels + upper[0].numel()] / safe_count(pixels))
        covariance = (triangle + triangle.triu(1).mT - _outer(exact)).to(covariance.dtype)
        mean = exact.to(mean.dtype)
    if variance is not None:
        shape = variance.shape[1:]
        variance = (total[-shape.numel():].view(shape) / safe_count(with_variance)).to(variance.dtype)
    return BatchMoments(pixels, with_variance, mean, covariance, variance)


def _outer(mean: Tensor) -> Tensor:
    """(G, d) -> (G, d, d)."""
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _upper_triangle(matrices: Tensor):
    """Indices of the upper triangles, diagonals included, of (G, d, d)."""
    groups, d, _ = matrices.shape
    rows, columns = torch.triu_indices(d, d, device=matrices.device)
    group = torch.arange(groups, device=matrices.device).repeat_interleave(len(rows))
    return group, rows.repeat(groups), columns.repeat(groups)
