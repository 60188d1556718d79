"""Inhibited channels (section 2, Figures 1a, 1b and 4d) and magnitude of features (Figure 3)."""
from difflib import get_close_matches
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from .collector import Collector, check_finite, feature_map, module_name
from .modules import Layers, evaluating, rectifiers, select
from .running_moments import RunningCovariance, pixels

INHIBITED = 1e-2  # section 2: channels of a smaller magnitude are inhibited


def share_below(values: Tensor, threshold: float) -> float:
    """Share of the values, in [0, 1], that are smaller than the threshold."""
    return (values < threshold).double().mean().item()


def check_threshold(threshold: float) -> float:
    """The threshold, if magnitudes can be below it; else an InputError."""
    if not threshold > 0:
        raise InputError(f'threshold must be positive, got {threshold!r}')
    return threshold


class InhibitedChannels(NamedTuple):
    """Mean |activation| of each channel behind each (call of a) rectifier, (C,), float64, CPU.

    Channels of a magnitude below the threshold are inhibited.
    """
    magnitudes: Dict[str, Tensor]
    threshold: float

    @property
    def shares(self) -> Dict[str, float]:
        """Share of inhibited channels of each layer, in [0, 1]."""
        return {name: share_below(magnitude, self.threshold)
                for name, magnitude in self.magnitudes.items()}

    @property
    def share(self) -> float:
        """Share of inhibited channels among those of all layers together."""
        return share_below(torch.cat(list(self.magnitudes.values())), self.threshold)


class ChannelMagnitudes(Collector):
    """Mean absolute activation of each channel behind the rectifiers; a `Collector`.

    The mean is over all images and positions. Rectifiers that are called as functions are not seen.

    Args:
        model: any network with rectifiers.
        layers: names of rectifiers, or regular expressions for whole names; None for all.

    Raises:
        InputError: there is no rectifier, or a pattern matches none.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        super().__init__(model, select(rectifiers(model), layers, 'rectifier module'),
                         lambda rectifier: RunningCovariance(_magnitudes))

    def result(self, threshold: float = INHIBITED) -> InhibitedChannels:
        """The magnitudes; an InputError unless finite, and if the threshold is not positive."""
        magnitudes = {label: check_finite(label, sums.mean.flatten().cpu())
                      for label, sums in self.statistics().items()}
        return InhibitedChannels(magnitudes, check_threshold(threshold))


def _magnitudes(inputs: tuple, output: Tensor) -> Tensor:
    """|x| as (C, M, 1), of which the products are those of each channel with itself."""
    return pixels(feature_map(output)).abs().mT.unsqueeze(-1)


def feature_magnitude(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """l2 norm over a layer's channels at each position (Figure 3).

    Args:
        model: any network; it runs once, in evaluation mode.
        images: what the model takes, such as (N, 3, H, W).
        layer: name of any module; `name#2` is the second call of one with several calls.

    Returns:
        (N, H', W') for an output (N, C, H', W'), float64.

    Raises:
        InputError: there is no such layer or call, or its output is no feature map.
    """
    modules = dict(model.named_modules())
    name = module_name(layer)
    if name not in modules:
        similar = get_close_matches(name, modules, n=5) or list(modules)[1:6]
        raise InputError(f'the model has no layer {name!r}; there are, for example, '
                         + ', '.join(map(repr, similar)))
    collector = Collector(model, {name: modules[name]}, lambda module: _ChannelNorm())
    with evaluating(model), torch.no_grad(), collector:
        model(images)
    calls = collector.statistics()
    if layer not in calls:
        raise InputError(f'layer {layer!r}: {name!r} is called {len(calls)} times; '
                         f'there are {", ".join(map(repr, calls))}')
    return calls[layer].value


class _ChannelNorm:

    def add(self, inputs, output) -> None:
        # At once, because a rectifier may overwrite the output.
        self.value = torch.linalg.vector_norm(feature_map(output).double(), dim=1)
