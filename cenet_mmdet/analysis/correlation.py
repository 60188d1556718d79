"""Correlations among the channels of a feature map (section 5.2, Figure 5)."""
from typing import Dict, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..layers import CE
from ..layers.steps.grouping import grouped
from ..layers.steps.moments import instance_variance
from .collector import Collector, check_finite, feature_map
from .modules import Layers, ce_layers, norms, select
from .running_moments import RunningCovariance, pixels


class Correlation(NamedTuple):
    """Of the channels at one point of a network, over all images and positions.

    Attributes:
        mean: |correlation|, in [0, 1], averaged over all pairs of different channels that
            vary; NaN if fewer than two do.
        varying: how many channels vary.
        constant: how many do not, and are left out: their standard deviation is 0, or
            within rounding of their mean.
    """
    mean: float
    varying: int
    constant: int


class ChannelCorrelations(Collector):
    """Mean absolute correlation between channels, by depth; used as Collector says.

    Of a CE layer at four points, those of Figure 5: its `input` x, which is what the norm
    returned; `bd`, W x; `ir`, diag(w_n) x; and its `output`. Of a norm at its `output`. The
    points of a branch that the CE layer does not have are left out. Correlations are among
    all channels, not within the groups only. They need far more positions than channels:
    independent channels correlate at about 0.8 / sqrt(positions).

    Keeps three matrices C x C in float64 for a CE layer, one for a norm.

    Args:
        model: any network, in evaluation mode.
        layers: names of CE layers and norms, or regular expressions that match all of a
            name; None for all CE layers, or all norms where there is no CE.

    Raises:
        ValueError: if there are neither, a pattern matches none, or a CE layer uses the
            statistics of its batch, with which W changes; and as Collector.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        candidates = {**ce_layers(model), **norms(model)}
        if layers is None:
            candidates = ce_layers(model) or candidates
        super().__init__(model, select(candidates, layers, 'CE layer or norm'))

    def _new(self, name: str):
        layer = self._layers[name]
        return _CEPoints(layer) if isinstance(layer, CE) else _Output()

    def result(self) -> Dict[str, Dict[str, Correlation]]:
        """{name: {point: Correlation}}, in the order of calls.

        Raises:
            ValueError: if no image was seen, or values are infinite.
        """
        return {label: statistics.result(label)
                for label, statistics in self._by_label().items()}


class _Output:
    """Of a norm."""

    def __init__(self) -> None:
        self.output = RunningCovariance()

    def add(self, inputs, output) -> None:
        self.output.add(pixels(feature_map(output)))

    def result(self, label: str) -> Dict[str, Correlation]:
        return {'output': _correlation(label, self.output)}


class _CEPoints:
    """Of a CE layer. W is constant in evaluation, so the input's moments are enough for W x."""

    def __init__(self, ce: CE) -> None:
        self.ce = ce
        self.input, self.ir, self.output = (RunningCovariance() for _ in range(3))

    def add(self, inputs, output) -> None:
        check_running_statistics(self.ce)
        x = inputs[0]
        self.input.add(pixels(x))
        if self.ce.has_ir:
            self.ir.add(pixels(self._gates(x) * x))
        self.output.add(pixels(output))

    def _gates(self, x: Tensor) -> Tensor:
        """F(v_n), which is w_n up to s: correlations do not see a scale common to all."""
        variance = instance_variance(grouped(x, self.ce.num_groups)).flatten(1)
        # forward, because nobody else's hooks shall see this call
        gates = self.ce.reweighting.forward(variance)
        return gates.to(x.dtype).view(*gates.shape, *[1] * (x.dim() - 2))

    def result(self, label: str) -> Dict[str, Correlation]:
        points = {'input': _correlation(label, self.input)}
        if self.ce.has_bd:
            whitening = torch.block_diag(*self.ce.running_whitening.double())
            points['bd'] = _correlation(label, self.input, whitening)
        if self.ce.has_ir:
            points['ir'] = _correlation(label, self.ir)
        points['output'] = _correlation(label, self.output)
        return points


def check_running_statistics(ce: CE) -> None:
    """Raises a ValueError where W and s are those of each batch."""
    if ce.uses_batch_statistics:
        raise ValueError('the CE layer is in training mode, where its operator is another one in '
                         'each batch; call model.eval() first')


def _correlation(label: str, x: RunningCovariance, matrix: Optional[Tensor] = None) -> Correlation:
    """Of x, or of matrix @ x."""
    covariance, scale = check_finite(label, x.moment), x.mean.abs()
    if matrix is not None:
        covariance, scale = matrix @ covariance @ matrix.mT, matrix.abs() @ scale
    # A constant is not one to the last digit, and what is left correlates at random.
    varies = covariance.diagonal().sqrt() > 8 * x.rounding * scale
    covariance = covariance[varies][:, varies]
    channels = len(covariance)
    mean = float('nan')
    if channels > 1:
        deviation = covariance.diagonal().sqrt()
        correlation = (covariance / deviation / deviation.unsqueeze(-1)).abs().fill_diagonal_(0)
        mean = (correlation.sum() / (channels * (channels - 1))).item()
    return Correlation(mean, channels, len(varies) - channels)
