"""The feature map as the steps see it: (N, C, ...) <-> (N, G, d, L)."""
import math
import warnings
from contextlib import nullcontext
from typing import ContextManager, Optional

import torch
from torch import Tensor, nn

from ...utils.compat import is_compiling


def fitting_group_size(channels: int, group_size: Optional[int]) -> int:
    """The largest of group_size, group_size / 2, ... that divides `channels`; None is all."""
    if group_size is None:
        return channels
    while channels % group_size:
        group_size //= 2
    return group_size


def check_channels(layer: nn.Module, x: Tensor, channels: int) -> None:
    """Raises a ValueError for a feature map of another rank or number of channels."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f'{type(layer).__name__} expects (N, {channels}), (N, {channels}, L) or '
                         f'(N, {channels}, H, W), got {tuple(x.shape)}')


def without_autocast(x: Tensor) -> ContextManager:
    """Autocast switched off: the small algebra is float32, whatever the feature map is."""
    # The meta device has no autocast to switch off.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def grouped(x: Tensor, groups: int) -> Tensor:
    """x (N, C, ...) as (N, G, d, L), C = G * d, L pixels; a view, except of channels_last.

    The batched products need the pixels of a channel side by side, where channels_last has
    the channels of a pixel. Such a map is copied, with one warning.
    """
    if not x.is_contiguous():
        _warn_of_copy(x)
        x = x.contiguous()
    # The pixels are counted because -1 is ambiguous for an empty batch; by prod, for which
    # exported programs keep them variable.
    return x.view(len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def ungrouped(out: Tensor, like: Tensor) -> Tensor:
    """out (N, G, d, L) in the shape and memory format of `like`."""
    # No view: residual blocks add to the output in place, which autograd handles at a cost in
    # views, or not at all. Nothing else holds the product.
    out = torch.ops.aten._unsafe_view(out, like.shape)
    memory_format = _channels_last(like)
    return out if memory_format is None else out.contiguous(memory_format=memory_format)


def _warn_of_copy(x: Tensor) -> None:
    if _channels_last(x) and not is_compiling():
        warnings.warn('CE, IterNorm and DBN work on NCHW feature maps: this channels_last input '
                      'is copied to NCHW, and the output back', stacklevel=4)


def _channels_last(x: Tensor) -> Optional[torch.memory_format]:
    """The memory format of x if it is channels_last and not NCHW too, as with one channel."""
    if x.is_contiguous():
        return None
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None
