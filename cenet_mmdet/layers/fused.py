r"""Batch norm and CE in one: both take their statistics from the same pass over the feature map.

Behind a batch norm, x = gamma (z - mean) / sigma + beta is an affine map of the convolution's
output z, channel by channel. With D = diag(gamma / sigma), the moments of x follow from those of z
by small algebra (equations 5 and 7):

    Sigma_x = D Sigma_z D        v_n(x) = D^2 v_n(z)

CE's operator and D make one matrix. So x is never computed: one pass takes the moments of z,
another applies the matrix and a bias, as many as batch norm needs alone. z, which batch norm keeps
for the backward pass anyway, is all that is kept. SyncBN and SyncCE need the same moments, which
cross between the ranks in one collective. beta is no part of Sigma_x, so inhibited channels, where
beta is far larger than gamma, lose no digits.
"""
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from .ce import CE
from .steps.apply import apply_behind
from .steps.grouping import check_channels, grouped, ungrouped, without_autocast
from .steps.moments import (
    BatchMoments,
    instance_variance,
    safe_count,
    statistics_dtype,
    with_batch_moments,
)
from .steps.running import read, track

SMALL = 1 << 18  # elements of a feature map


def batch_norm_ce(norm: Any, ce: Any, z: Tensor) -> Tensor:
    """ce(norm(z)): in one where `can_fuse` allows it, else one after the other."""
    return fused_batch_norm_ce(norm, ce, z) if can_fuse(norm, ce, z) else ce(norm(z))


def fused_batch_norm_ce(norm: _BatchNorm, ce: CE, z: Tensor) -> Tensor:
    """ce(norm(z)) in one; `CE.forward` has the same steps."""
    check_channels(ce, z, ce.in_channels)
    with without_autocast(z):
        maps = grouped(z, ce.num_groups)  # (N, G, d, L)
        if ce.takes_statistics_from(z):
            maps, samples = with_batch_moments(maps)
            batch = ce.over_ranks(samples)
            affine = batch_affine(norm, batch) if uses_batch(norm) else running_affine(norm, maps)
            batch_x = affine.moments(batch)
            # on one process, the variances of the batch are the samples' own
            variance = (batch_x.variance if batch is samples
                        else affine.variance(samples.variance))
            whitening, scale = ce.batch_statistics(batch_x)
            finite = ce.track(batch_x, whitening, scale)
            track_batch_norm(norm, batch, finite)
        else:
            affine = running_affine(norm, maps)
            variance = affine.variance(instance_variance(maps)) if ce.has_ir else None
            whitening, scale = ce.running_statistics(maps)
        operator = ce.operator(variance, whitening, scale)
        return ungrouped(apply_behind(operator, *affine, maps), like=z)


class Affine(NamedTuple):
    """x = scale * (z - mean) + shift, each (G, d)."""
    scale: Tensor
    mean: Tensor
    shift: Tensor

    def moments(self, z: BatchMoments) -> BatchMoments:
        """Moments of x from those of z."""
        # Behind a norm that takes its mean from the batch, that of x is the shift.
        mean = self.shift if self.mean is z.mean else self.scale * (z.mean - self.mean) + self.shift
        products = self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)
        return z._replace(mean=mean, covariance=products * z.covariance,
                          variance=products.diagonal(dim1=-2, dim2=-1) * z.variance)

    def variance(self, z: Tensor) -> Tensor:
        """v_n of x from that of z, (..., G, d)."""
        return self.scale.square() * z


def batch_affine(norm: _BatchNorm, batch: BatchMoments) -> Affine:
    """The map that the norm is on this batch."""
    return _affine(norm, batch.mean, batch.covariance.diagonal(dim1=-2, dim2=-1))


def running_affine(norm: _BatchNorm, maps: Tensor) -> Affine:
    """The map that the norm is in evaluation."""
    mean, variance = (read(buffer, statistics_dtype(maps.dtype)).view(maps.shape[1:3])
                      for buffer in (norm.running_mean, norm.running_var))
    return _affine(norm, mean, variance)


def _affine(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> Affine:
    scale = (variance + norm.eps).rsqrt()
    if not norm.affine:
        return Affine(scale, mean, torch.zeros_like(mean))
    weight, bias = (p.to(mean.dtype).view(mean.shape) for p in (norm.weight, norm.bias))
    return Affine(scale * weight, mean, bias)


@torch.no_grad()
def track_batch_norm(norm: _BatchNorm, batch: BatchMoments, finite: Tensor) -> None:
    """Update the norm's running statistics as the norm does, if the batch is finite."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum = norm.momentum
    if momentum is None:  # the plain average of all batches
        momentum = 1 / float(norm.num_batches_tracked + 1)
    variance = batch.covariance.diagonal(dim1=-2, dim2=-1)
    unbiased = variance * (batch.pixels / safe_count(batch.pixels - 1))
    track([(norm.running_mean, batch.mean), (norm.running_var, unbiased)], momentum,
          norm.num_batches_tracked, finite)


def can_fuse(norm: Any, ce: Any, z: Tensor) -> bool:
    """Whether `ce(norm(z))` may be computed in one.

    It may for a batch norm in front of a CE with BD, if calling them does nothing else: hooks and
    wrappers want to see what goes from one to the other. Where only one of the two takes its
    statistics from the batch, or from other ranks, each computes its own.
    """
    return (type(ce).forward is CE.forward and ce.has_bd
            and isinstance(norm, _BatchNorm)
            and type(norm).forward in (_BatchNorm.forward, SyncBatchNorm.forward)
            and (ce.uses_batch_statistics or not uses_batch(norm))
            and _ranks(norm) == _ranks(ce)
            # without gradients, one more pass over a small map is cheaper than more operations
            and (ce.uses_batch_statistics or torch.is_grad_enabled() or z.numel() > SMALL)
            # one value per channel: the norm refuses
            and (_ranks(norm) is not None or z.numel() > norm.num_features)
            and _only_computes(norm) and _only_computes(ce))


def uses_batch(norm: _BatchNorm) -> bool:
    """Whether the norm's next forward takes the statistics of its batch."""
    return norm.training or norm.running_mean is None


def _ranks(layer: Any) -> Optional[Tuple]:
    """The process group, as a tuple, that the layer's next forward takes statistics from."""
    if isinstance(layer, SyncBatchNorm):
        synchronizes = (layer.training and dist.is_available() and dist.is_initialized()
                        and dist.get_world_size(layer.process_group) > 1)
    else:
        synchronizes = getattr(layer, 'synchronizes', False) and layer.uses_batch_statistics
    return (layer.process_group, ) if synchronizes else None


def _only_computes(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else.

    Hooks look at inputs and outputs, and MMEngine's activation checkpointing puts another forward
    into the module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks,
             module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and 'forward' not in vars(module)
