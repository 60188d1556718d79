"""The feature map as the steps see it: (N, C, ...) <-> (N, G, d, L)."""
import math
import warnings

import torch
from torch import Tensor

from ..compat import is_compiling


def grouped(x: Tensor, groups: int) -> Tensor:
    """x (N, C, ...) as (N, G, d, L), C = G * d, L pixels; a view, except of channels_last.

    The batched products need the pixels of a channel side by side, where channels_last has
    the channels of a pixel. Such a map is copied, of which the user is told once.
    """
    if not x.is_contiguous():
        _warn_of_copy(x)
        x = x.contiguous()
    # The pixels are counted because -1 is ambiguous for an empty batch; by prod, for which
    # exported programs keep them variable.
    return x.view(len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def ungrouped(out: Tensor, like: Tensor) -> Tensor:
    """out (N, G, d, L) in the shape and memory format of `like`."""
    # The product is new, so its other shape need not be a view: residual blocks
    # add to it in place, which autograd handles at a cost, or not at all, in views.
    out = torch.ops.aten._unsafe_view(out, like.shape)
    memory_format = _channels_last(like)
    return out if memory_format is None else out.contiguous(memory_format=memory_format)


def _warn_of_copy(x: Tensor) -> None:
    if _channels_last(x) and not is_compiling():
        warnings.warn('CE, IterNorm and DBN work on NCHW feature maps: this channels_last input '
                      'is copied to NCHW, and the output back', stacklevel=4)


def _channels_last(x: Tensor):
    """The memory format of x if it is channels_last and not NCHW too, as with one channel."""
    if x.is_contiguous():
        return None
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None
