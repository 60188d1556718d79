"""What CE layers have learned: lambda, W and the spread of w_n (equations 4, 6 and 8)."""
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import CE
from .collector import Collector, check_finite
from .correlation import check_running_statistics
from .modules import Layers, ce_layers, select
from .running_moments import RunningVariance


def lambdas(model: nn.Module) -> Dict[str, float]:
    """lambda, the weight of BD against IR in [0, 1], of every CE layer (equation 4, Table 4).

    In the order of the model's modules.

    Raises:
        ValueError: if the model has no CE layer.
    """
    layers = select(ce_layers(model), None, 'CE layer')
    return {name: _lambda(ce) for name, ce in layers.items()}


def _lambda(ce: CE) -> float:
    with torch.no_grad():
        return float(ce.ratio(torch.float64))


class Spectrum(NamedTuple):
    """Of one W in evaluation, float64, on the CPU.

    Attributes:
        eigenvalues: of each group in ascending order, (G, d); I has ones, T steps give at
            most 1.5^T.
        condition: largest by smallest absolute eigenvalue, (G,).
    """
    eigenvalues: Tensor
    condition: Tensor


def spectra(model: nn.Module) -> Dict[str, Spectrum]:
    """Spectrum of the running W of every CE layer with a BD branch (equation 6).

    In the order of the model's modules.

    Raises:
        ValueError: if the model has no such layer.
    """
    layers = {name: ce for name, ce in ce_layers(model).items() if ce.has_bd}
    return {name: _spectrum(ce.running_whitening)
            for name, ce in select(layers, None, 'CE layer with a BD branch').items()}


def _spectrum(whitening: Tensor) -> Spectrum:
    whitening = whitening.double().cpu()
    # It is symmetric up to rounding, as a polynomial of a symmetric matrix.
    eigenvalues = torch.linalg.eigvalsh((whitening + whitening.mT) / 2)
    sizes = eigenvalues.abs()
    return Spectrum(eigenvalues, sizes.amax(-1) / sizes.amin(-1))


class Spread(NamedTuple):
    """How much the weights w_n of one layer depend on the image.

    Attributes:
        per_channel: standard deviation over images (biased) by mean, (C,), float64, on the
            CPU.
        mean: over the channels.
    """
    per_channel: Tensor
    mean: float


class ReweightingSpread(Collector):
    """Spread over images of the IR weights w_n (equation 8); used as Collector says.

    0 says that all images get the same weights, so that IR is a static scaling.

    Args:
        model: a network with CE, in evaluation mode.
        layers: names of CE layers, or regular expressions that match all of a name; None
            for all with an IR branch.

    Raises:
        ValueError: if there is no such layer, a pattern matches none, or a CE layer uses
            the statistics of its batch; and as Collector.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        with_ir = {name: ce for name, ce in ce_layers(model).items() if ce.has_ir}
        self._ce = select(with_ir, layers, 'CE layer with an IR branch')
        super().__init__(model, {name: ce.reweighting for name, ce in self._ce.items()})

    def _new(self, name: str) -> '_Weights':
        return _Weights(self._ce[name])

    def result(self) -> Dict[str, Spread]:
        """By the names of the CE layers, in the order of calls.

        Raises:
            ValueError: if fewer than two images were seen, or values are infinite.
        """
        return {label: weights.spread(label) for label, weights in self._by_label().items()}


class _Weights:
    """Mean and variance of F(v_n), which is w_n up to s: the quotient does not see s."""

    def __init__(self, ce: CE) -> None:
        self.ce = ce
        self.gates = RunningVariance()

    def add(self, inputs, output) -> None:
        check_running_statistics(self.ce)
        self.gates.add(output)

    def spread(self, label: str) -> Spread:
        if self.gates.count < 2:
            raise ValueError(f'{label}: {self.gates.count} images were seen, '
                             'a spread needs at least two')
        per_channel = check_finite(label, self.gates.moment.sqrt() / self.gates.mean).cpu()
        return Spread(per_channel, per_channel.mean().item())
