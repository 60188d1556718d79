"""Correlations between channels (section 5.2, Figure 5), and the weights w_n (equation 8)."""
from typing import Any, Dict, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..layers import CE
from ..layers.steps.grouping import grouped
from ..layers.steps.moments import instance_variance
from ..utils.errors import InputError
from .collector import Collector, Moments, module_name, moments, pixels
from .modules import Layers, ce_layers, norms, select

POINTS = 'input', 'bd', 'ir', 'output'  # of a CE layer, as in Figure 5


class Correlation(NamedTuple):
    """Of the channels at one point of a network, over all images and positions.

    `mean` is the mean |correlation| of all pairs of channels that vary, in [0, 1]; NaN if there is
    none. The others are constant: their deviation is 0, or within rounding of their mean.
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
    deviation = covariance.diagonal().sqrt()
    correlation = (covariance / deviation / deviation.unsqueeze(-1)).abs().fill_diagonal_(0)
    mean = correlation.sum() / (channels * (channels - 1))  # NaN of one channel
    return Correlation(mean.item(), channels, len(varies) - channels)


class ChannelCorrelations(Collector):
    """Mean |correlation| between channels by depth; a `Collector`.

    A CE layer has the four points of Figure 5: its `input` x, which the norm returned; `bd`, W x;
    `ir`, diag(w_n) x; and its `output`. The point of a branch that it lacks is left out. A norm
    has its `output`. The correlations are among all channels, not only within the groups. They
    need many positions: independent channels correlate at about 0.8 / sqrt(positions).

    The model is in evaluation mode. `layers` names CE layers and norms, see `select`; None is all
    CE layers, or all norms where there is no CE.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        found: Dict[str, nn.Module] = {**ce_layers(model)} if layers is None else {}
        found = found or {**ce_layers(model), **norms(model)}
        super().__init__(model, select(found, layers, 'CE layer or norm'), _points)

    def result(self) -> Dict[str, Dict[str, Correlation]]:
        """{name: {point: Correlation}}, in the order of calls."""
        results = {}
        for label, points in self.statistics().items():
            found = {point: mean_correlation(x.covariance, x.mean.abs(), x.rounding)
                     for point, x in points.items()}
            layer = self._layers[module_name(label)]
            if isinstance(layer, CE) and layer.has_bd:
                # W is constant in evaluation, so the moments of x give those of W x.
                x, whitening = points['input'], torch.block_diag(*layer.running_whitening.double())
                found['bd'] = mean_correlation(whitening @ x.covariance @ whitening.mT,
                                               whitening.abs() @ x.mean.abs(), x.rounding)
            results[label] = {point: found[point] for point in POINTS if point in found}
        return results


def _points(layer: nn.Module, inputs: Any, output: Tensor, before: Any) -> Dict[str, Moments]:
    maps = {'output': output}
    if isinstance(layer, CE):
        x = maps['input'] = inputs[0]
        weights = instance_weights(layer, x)
        if layer.has_ir:
            maps['ir'] = weights.to(x.dtype).view(*weights.shape, *[1] * (x.dim() - 2)) * x
    return {point: moments(pixels(x), before and before[point]) for point, x in maps.items()}


def instance_weights(ce: CE, x: Tensor) -> Optional[Tensor]:
    """F(v_n) of x, (N, C), which is w_n but for the scale s that all have in common.

    None without IR; an InputError if the layer is in training mode.
    """
    if ce.uses_batch_statistics:
        raise InputError('the CE layer is in training mode, where its operator is another one in '
                         'each batch; call model.eval() first')
    if not ce.has_ir:
        return None
    return ce.reweighting(instance_variance(grouped(x, ce.num_groups)).flatten(1))


class Spread(NamedTuple):
    """Deviation of w_n over images (biased) / its mean, (C,), float64, CPU; the mean over C."""
    per_channel: Tensor
    mean: float


class ReweightingSpread(Collector):
    """Spread over images of the IR weights w_n (equation 8); a `Collector`.

    0 means that all images get the same weights, so that IR is a static scaling. The model is in
    evaluation mode. `layers` names CE layers, see `select`.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        with_ir = {name: ce for name, ce in ce_layers(model).items() if ce.has_ir}
        # (C, N, 1): each channel by itself
        super().__init__(model, select(with_ir, layers, 'CE layer with IR') if layers else with_ir,
                         lambda ce, inputs, output, before:
                         moments(instance_weights(ce, inputs[0]).mT.unsqueeze(-1), before))

    def result(self) -> Dict[str, Spread]:
        """By CE layer with IR, in the order of calls; empty unless there were two images."""
        found = {}
        for label, weights in self.statistics().items():
            if weights.rows > 1:
                spread = (weights.covariance.sqrt().squeeze(-1) / weights.mean).flatten().cpu()
                found[label] = Spread(spread, spread.mean().item())
        return found
