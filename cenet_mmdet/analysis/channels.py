"""Inhibited channels (section 2, Figures 1a, 1b and 4d) and magnitude of features (Figure 3)."""
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from .collector import Collector, module_name, moments, pixels
from .modules import Layers, evaluating, rectifiers, select

INHIBITED = 1e-2  # section 2: channels of a smaller magnitude are inhibited


def share_below(values: Tensor, threshold: float) -> float:
    """Share of the values, in [0, 1], that are smaller than the threshold, a positive number."""
    if not threshold > 0:
        raise InputError(f'threshold must be positive, got {threshold!r}')
    return (values < threshold).double().mean().item()


class InhibitedChannels(NamedTuple):
    """Mean |activation| of each channel behind each rectifier, (C,), float64, on the CPU.

    Channels below the threshold are inhibited: `shares` behind each rectifier, `share` of all.
    """
    magnitudes: Dict[str, Tensor]
    shares: Dict[str, float]
    share: float


class ChannelMagnitudes(Collector):
    """Mean |activation| of each channel, over images and positions; a `Collector`.

    `layers` names rectifier modules, see `select`. Those called as functions are not seen.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        # (C, M, 1): each channel by itself
        super().__init__(model, select(rectifiers(model), layers, 'rectifier module'),
                         lambda rectifier, inputs, output, before:
                         moments(pixels(output).abs().mT.unsqueeze(-1), before))

    def result(self, threshold: float = INHIBITED) -> InhibitedChannels:
        """By rectifier and call; an InputError unless the threshold is positive."""
        found = {label: x.mean.flatten().cpu() for label, x in self.statistics().items()}
        shares = {label: share_below(x, threshold) for label, x in found.items()}
        total = share_below(torch.cat(list(found.values())), threshold)
        return InhibitedChannels(found, shares, total)


def feature_magnitude(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """l2 norm over a layer's channels at each position (Figure 3), float64.

    The model runs once, in evaluation mode, on `images`. `layer` names any module; `name#2` is its
    second call, if it has several. An output (N, C, H', W') gives (N, H', W').

    Raises:
        InputError: there is no such layer or call, or its output is no tensor.
    """
    modules = select(dict(model.named_modules()), module_name(layer), 'layer')
    collector = Collector(model, modules, lambda layer, inputs, output, before:
                          torch.linalg.vector_norm(output.double(), dim=1))
    with evaluating(model), torch.no_grad(), collector:
        model(images)
    calls = collector.statistics()
    if layer not in calls:
        raise InputError(f'layer {layer!r} is not one of the calls {", ".join(map(repr, calls))}')
    return calls[layer]
