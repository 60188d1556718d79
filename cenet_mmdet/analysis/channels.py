"""Inhibited channels (section 2, Figures 1a, 1b and 4d) and the magnitude of features (Figure 3).
"""
from difflib import get_close_matches
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from .collector import Collector, check_finite, feature_map, module_name
from .modules import Layers, evaluating, select
from .rectifiers import rectifiers

INHIBITED = 1e-2  # section 2: channels of a smaller magnitude are inhibited


def share_below(values: Tensor, threshold: float) -> float:
    """Share of the values, in [0, 1], that are smaller than the threshold."""
    return (values < threshold).double().mean().item()


def check_threshold(threshold: float) -> float:
    """The threshold, if there are magnitudes below it."""
    if not threshold > 0:
        raise ValueError(f'threshold must be positive, got {threshold!r}')
    return threshold


class InhibitedChannels(NamedTuple):
    """What `ChannelMagnitudes` measured.

    Attributes:
        magnitudes: for each call of a rectifier, in the order of calls, the mean absolute
            activation behind it of each channel, (C,), float64, on the CPU.
        threshold: channels of a smaller magnitude are inhibited.
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
    """Mean absolute activation of each channel behind the rectifiers.

    Over all images and positions; used as Collector says. Rectifiers are modules: those
    called as functions are not seen, nor is the one in CE's own subnetwork.

    Args:
        model: any network with rectifiers.
        layers: names of rectifiers, or regular expressions that match all of a name; None
            for all there are.

    Raises:
        ValueError: if there is no rectifier, or a pattern matches none; and as Collector.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        super().__init__(model, select(rectifiers(model), layers, 'rectifier module'))

    def _new(self, name: str) -> '_AbsoluteSum':
        return _AbsoluteSum()

    def result(self, threshold: float = INHIBITED) -> InhibitedChannels:
        """The magnitudes, and below which of them channels are inhibited.

        Raises:
            ValueError: if no image was seen, a layer saw none, activations are infinite,
                or the threshold is not positive.
        """
        magnitudes = {label: check_finite(label, sums.mean().cpu())
                      for label, sums in self._by_label().items()}
        return InhibitedChannels(magnitudes, check_threshold(threshold))


class _AbsoluteSum:
    """Sum over images and positions of |x|, and the number of these."""

    def __init__(self) -> None:
        self.total = 0
        self.count = 0

    def add(self, inputs, output) -> None:
        x = feature_map(output)
        others = [dim for dim in range(x.dim()) if dim != 1]
        self.total = self.total + x.abs().sum(others, dtype=torch.float64)
        self.count += x.numel() // x.shape[1]

    def mean(self) -> Tensor:
        return self.total / self.count


def feature_magnitude(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """l2 norm over the channels of a layer's output, at each position (Figure 3).

    The figure shows the mean over a batch: that of the first dimension. The model is called
    once, in evaluation mode; its modes are restored.

    Args:
        model: any network.
        images: (N, 3, H, W), or whatever the model takes.
        layer: name of any module; `name#2` is the second call of one that is called
            several times.

    Returns:
        (N, H', W') for an output (N, C, H', W'), float64.

    Raises:
        ValueError: if there is no such layer, it is not called, called several times, or
            its output is no feature map.
    """
    modules = dict(model.named_modules())
    name = module_name(layer)
    if name not in modules:
        similar = get_close_matches(name, modules, n=5) or list(modules)[1:6]
        raise ValueError(f'the model has no layer {name!r}; there are, for example, '
                         + ', '.join(map(repr, similar)))
    with evaluating(model), torch.no_grad(), _Norms(model, {name: modules[name]}) as norms:
        model(images)
    found = norms.result()
    if layer not in found:
        raise ValueError(f'layer {layer!r}: {name!r} is called {len(found)} times; '
                         f'there are {", ".join(map(repr, found))}')
    return found[layer]


class _Norms(Collector):
    """Norms over the channels, of one pass."""

    def _new(self, name: str) -> '_NormOfChannels':
        return _NormOfChannels()

    def result(self) -> Dict[str, Tensor]:
        return {label: norm.value for label, norm in self._by_label().items()}


class _NormOfChannels:

    def add(self, inputs, output) -> None:
        # Here and now, as a rectifier may overwrite the output.
        self.value = torch.linalg.vector_norm(feature_map(output).double(), dim=1)
