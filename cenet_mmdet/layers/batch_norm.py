"""BN and CE in one: the statistics of both from the same pass over the convolution's output z.

Behind a batch norm, x = gamma (z - mean) / sigma + beta is an affine map of z, channel
by channel. With D = diag(gamma / sigma), its moments follow from those of z by small
algebra (equations 5 and 7):

    Sigma_x = D Sigma_z D        v_n(x) = D^2 v_n(z)

and CE's operator and D make one matrix. So x is never formed: one pass takes the moments
of z, another applies the matrix and a bias, as many as BN needs alone, and z, which BN
keeps for the backward pass anyway, is all that is kept. beta is no part of any moment,
which spares inhibited channels, where it exceeds gamma by far, a loss of digits.
"""
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .moments import Moments


class Affine(NamedTuple):
    """x = scale * (z - mean) + shift, each (G, d)."""
    scale: Tensor
    mean: Tensor
    shift: Tensor

    def moments(self, z: Moments) -> Moments:
        """Moments of x from those of z."""
        scatter = self.scale.unsqueeze(-1) * z.scatter * self.scale.unsqueeze(-2)
        return Moments(z.pixels, self.scale * (z.mean - self.mean) + self.shift, scatter)

    def variance(self, z: Tensor) -> Tensor:
        """v_n of x from that of z, (N, G, d)."""
        return self.scale.square() * z


def norm_then_ce(norm: nn.Module, ce: nn.Module, z: Tensor) -> Tensor:
    """ce(norm(z)), in one where that is possible."""
    return ce.forward_behind(norm, z) if can_fuse(norm, ce, z) else ce(norm(z))


def can_fuse(norm: nn.Module, ce: nn.Module, z: Tensor) -> bool:
    """Whether `ce(norm(z))` may be computed in one.

    A plain batch norm on the CPU or one GPU in front of a CE with BD can; nobody may want
    to see what goes from one to the other (forward hooks). Where batch norm learns its
    statistics and CE does not, each works for itself.
    """
    return (isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward
            and getattr(ce, 'has_bd', False)
            and z.numel() > norm.num_features  # one value per channel is refused by the norm
            and (ce.uses_batch_statistics or not _uses_batch(norm))
            and not (norm._forward_hooks or norm._forward_pre_hooks
                     or ce._forward_hooks or ce._forward_pre_hooks))


def affine_of(norm: _BatchNorm, shape: torch.Size, dtype: torch.dtype,
              z: Optional[Moments] = None) -> Affine:
    """The map that a batch norm is, with its running statistics updated as it would.

    Args:
        norm: the batch norm.
        shape: (G, d).
        dtype: of the statistics.
        z: moments of the batch; None for a norm in evaluation.
    """
    if _uses_batch(norm):
        count = len(z.mean) * z.pixels
        mean = z.mean.mean(0)
        squares = z.scatter.diagonal(dim1=-2, dim2=-1) + z.pixels * (z.mean - mean).square()
        variance = squares.sum(0) / count
        _track(norm, mean, variance * count / (count - 1))
    else:
        # Copies: another forward in training may update the buffers before the backward.
        mean, variance = (buffer.to(dtype, copy=True).view(shape)
                          for buffer in (norm.running_mean, norm.running_var))
    scale = (variance + norm.eps).rsqrt()
    if not norm.affine:
        return Affine(scale, mean, torch.zeros_like(mean))
    return Affine(scale * norm.weight.to(dtype).view(shape), mean,
                  norm.bias.to(dtype).view(shape))


def _uses_batch(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, unbiased: Tensor) -> None:
    """As torch's batch norm: momentum None is the plain average of all batches."""
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)
    weight = norm.momentum
    if weight is None:
        weight = 1 / float(norm.num_batches_tracked)
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.lerp_(new.flatten().to(running.dtype), weight)
