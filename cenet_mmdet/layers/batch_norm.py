"""BN and CE in one: the statistics of both from the same pass over the convolution's output z.

Behind a batch norm, x = gamma (z - mean) / sigma + beta is an affine map of z, channel
by channel. With D = diag(gamma / sigma), its moments follow from those of z by small
algebra (equations 5 and 7):

    Sigma_x = D Sigma_z D        v_n(x) = D^2 v_n(z)

The moments of SyncBN and SyncCE are the same ones too, and cross by one collective. And
CE's operator and D make one matrix. So x is never formed: one pass takes the moments of z,
another applies the matrix and a bias, as many as BN needs alone, and z, which BN keeps for
the backward pass anyway, is all that is kept. beta is no part of any moment, which spares
inhibited channels, where it exceeds gamma by far, a loss of digits.
"""
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from .moments import BatchMoments, at_least_one, track


class Affine(NamedTuple):
    """x = scale * (z - mean) + shift, each (G, d)."""
    scale: Tensor
    mean: Tensor
    shift: Tensor

    def moments(self, z: BatchMoments) -> BatchMoments:
        """Moments of x from those of z."""
        mean = self.scale * (z.mean - self.mean) + self.shift
        scatter = self.scale.unsqueeze(-1) * z.scatter * self.scale.unsqueeze(-2)
        variance = None if z.variance is None else self.variance(z.variance)
        return z._replace(mean=mean, scatter=scatter, variance=variance)

    def variance(self, z: Tensor) -> Tensor:
        """v_n of x from that of z, (..., G, d)."""
        return self.scale.square() * z


def norm_then_ce(norm: nn.Module, ce: nn.Module, z: Tensor) -> Tensor:
    """ce(norm(z)), in one where that is possible."""
    return ce.forward_behind(norm, z) if can_fuse(norm, ce, z) else ce(norm(z))


def can_fuse(norm: nn.Module, ce: nn.Module, z: Tensor) -> bool:
    """Whether `ce(norm(z))` may be computed in one.

    A batch norm in front of a CE with BD can, if both are called as they are: nobody may want to
    see what goes from one to the other, or to be asked first (hooks, wrappers). Where batch norm
    learns its statistics and CE does not, or only one of them over several ranks, each works for
    itself.
    """
    return (isinstance(norm, _BatchNorm)
            and type(norm).forward in (_BatchNorm.forward, SyncBatchNorm.forward)
            and hasattr(type(ce), 'forward_behind')  # not of a wrapper: FSDP's has the weights
            and ce.has_bd
            and (ce.uses_batch_statistics or not uses_batch(norm))
            and (_share_ranks(norm, ce) if synchronizes(norm)
                 else z.numel() > norm.num_features)  # one value per channel: the norm refuses
            and _as_it_is(norm) and _as_it_is(ce))


def _as_it_is(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and no more.

    Hooks look at what comes in and goes out, either way; MMEngine's activation checkpointing
    puts another forward into the module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks,
             module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and 'forward' not in vars(module)


def affine_of(norm: _BatchNorm, shape: torch.Size, dtype: torch.dtype,
              z: Optional[BatchMoments]) -> Affine:
    """The map that a batch norm is, with its running statistics updated as it would.

    Args:
        norm: the batch norm.
        shape: (G, d).
        dtype: of the statistics.
        z: moments of the batch, of which a norm in evaluation has no need.
    """
    if uses_batch(norm):
        squares = z.scatter.diagonal(dim1=-2, dim2=-1)
        mean, variance = z.mean, squares / at_least_one(z.pixels)
        _track(norm, mean, squares / at_least_one(z.pixels - 1), z.pixels)
    else:
        # Copies: another forward in training may update the buffers before the backward.
        mean, variance = (buffer.to(dtype, copy=True).view(shape)
                          for buffer in (norm.running_mean, norm.running_var))
    scale = (variance + norm.eps).rsqrt()
    if not norm.affine:
        return Affine(scale, mean, torch.zeros_like(mean))
    return Affine(scale * norm.weight.to(dtype).view(shape), mean,
                  norm.bias.to(dtype).view(shape))


def uses_batch(norm: _BatchNorm) -> bool:
    """Whether the norm's next forward takes the statistics of its batch."""
    return norm.training or norm.running_mean is None


def synchronizes(norm: _BatchNorm) -> bool:
    """Whether these are then the statistics of other ranks too."""
    return (isinstance(norm, SyncBatchNorm) and norm.training
            and dist.is_available() and dist.is_initialized()
            and dist.get_world_size(norm.process_group) > 1)


def _share_ranks(norm: SyncBatchNorm, ce: nn.Module) -> bool:
    return getattr(ce, 'synchronizes', False) and ce.process_group is norm.process_group


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, unbiased: Tensor, pixels) -> None:
    """As torch's batch norm: momentum None is the plain average of all batches."""
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)
    weight = norm.momentum
    if weight is None:
        weight = 1 / float(norm.num_batches_tracked)
    track(norm.running_mean, mean, weight, pixels)
    track(norm.running_var, unbiased, weight, pixels)
