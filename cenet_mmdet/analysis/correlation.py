"""Correlations among the channels of a feature map (section 5.2, Figure 5)."""
from typing import Dict, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..layers import CE
from ..layers.steps.grouping import grouped
from ..layers.steps.moments import instance_variance
from ..utils.errors import InputError
from .collector import Collector, check_finite, feature_map
from .modules import Layers, ce_layers, norms, select
from .running_moments import RunningCovariance, pixels

POINTS = 'input', 'bd', 'ir', 'output'  # of a CE layer, as in Figure 5


class Correlation(NamedTuple):
    """Of the channels at one point of a network, over all images and positions.

    Attributes:
        mean: mean |correlation| of all pairs of varying channels, in [0, 1]; NaN if there is none.
        varying: number of channels that vary.
        constant: number of channels with a deviation of 0, or within rounding of their mean.
    """
    mean: float
    varying: int
    constant: int


def mean_correlation(covariance: Tensor, scale: Tensor, rounding: float) -> Correlation:
    """Correlation of channels from their covariance, (C, C).

    `scale` is the magnitude of their means, (C,), and `rounding` the relative error of the values.
    """
    # The values of a constant channel may differ in the last digit, and then correlate at random.
    varies = covariance.diagonal().sqrt() > 8 * rounding * scale
    covariance = covariance[varies][:, varies]
    channels = len(covariance)
    mean = float('nan')
    if channels > 1:
        deviation = covariance.diagonal().sqrt()
        correlation = (covariance / deviation / deviation.unsqueeze(-1)).abs().fill_diagonal_(0)
        mean = (correlation.sum() / (channels * (channels - 1))).item()
    return Correlation(mean, channels, len(varies) - channels)


class ChannelCorrelations(Collector):
    """Mean absolute correlation between channels by depth; a `Collector`.

    A CE layer has the four points of Figure 5: its `input` x, which the norm returned; `bd`, W x;
    `ir`, diag(w_n) x; and its `output`; without those of a branch that it does not have. A norm
    has its `output`. The correlations are among all channels, not only within the groups. They
    need many positions: independent channels correlate at about 0.8 / sqrt(positions). Each point
    but `bd` keeps a matrix C x C in float64.

    Args:
        model: any network, in evaluation mode.
        layers: names of CE layers and norms, or regular expressions for whole names; None for all
            CE layers, or all norms where there is no CE.

    Raises:
        InputError: there are neither, a pattern matches none, or a CE layer is in training mode,
            which changes W.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        candidates = {**ce_layers(model), **norms(model)}
        if layers is None:
            candidates = ce_layers(model) or candidates
        super().__init__(model, select(candidates, layers, 'CE layer or norm'), _Points)

    def result(self) -> Dict[str, Dict[str, Correlation]]:
        """{name: {point: Correlation}}, in the order of calls; an InputError unless finite."""
        return {label: points.result(label) for label, points in self.statistics().items()}


class _Points:
    """Of a CE layer or norm. W is constant in evaluation: the input's moments suffice for W x."""

    def __init__(self, layer: nn.Module) -> None:
        self.ce = layer if isinstance(layer, CE) else None
        rows = {'output': lambda _, output: pixels(feature_map(output))}
        if self.ce:
            rows['input'] = lambda inputs, _: pixels(inputs[0])
        if self.ce and self.ce.has_ir:
            rows['ir'] = lambda inputs, _: pixels(self._gates(inputs[0]) * inputs[0])
        self.sums = {point: RunningCovariance(function) for point, function in rows.items()}

    def add(self, inputs, output) -> None:
        if self.ce:
            check_running_statistics(self.ce)
        for sums in self.sums.values():
            sums.add(inputs, output)

    def _gates(self, x: Tensor) -> Tensor:
        """F(v_n), which is w_n up to s: a scale common to all does not change correlations."""
        variance = instance_variance(grouped(x, self.ce.num_groups)).flatten(1)
        # forward() by itself, so that hooks of others do not see this call
        gates = self.ce.reweighting.forward(variance)
        return gates.to(x.dtype).view(*gates.shape, *[1] * (x.dim() - 2))

    def result(self, label: str) -> Dict[str, Correlation]:
        found = {point: _correlation(label, sums) for point, sums in self.sums.items()}
        if self.ce and self.ce.has_bd:
            whitening = torch.block_diag(*self.ce.running_whitening.double())
            found['bd'] = _correlation(label, self.sums['input'], whitening)
        return {point: found[point] for point in POINTS if point in found}


def check_running_statistics(ce: CE) -> None:
    """Raises an InputError if W and s are those of each batch."""
    if ce.uses_batch_statistics:
        raise InputError('the CE layer is in training mode, where its operator is another one in '
                         'each batch; call model.eval() first')


def _correlation(label: str, x: RunningCovariance, matrix: Optional[Tensor] = None) -> Correlation:
    """Of x, or of matrix @ x."""
    covariance, scale = check_finite(label, x.covariance), x.mean.abs()
    if matrix is not None:
        covariance, scale = matrix @ covariance @ matrix.mT, matrix.abs() @ scale
    return mean_correlation(covariance, scale, x.rounding)
