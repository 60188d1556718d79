"""What CE layers have learned: lambda, W and the spread of w_n (equations 4, 6 and 8)."""
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from .collector import Collector, check_finite
from .correlation import check_running_statistics
from .modules import Layers, ce_layers, select
from .running_moments import RunningCovariance


@torch.no_grad()
def lambdas(model: nn.Module) -> Dict[str, float]:
    """lambda, the weight of BD against IR in [0, 1], of every CE layer (equation 4, Table 4).

    In the order of the model's modules.
    """
    return {name: float(ce.ratio(torch.float64)) for name, ce in ce_layers(model).items()}


class Spectrum(NamedTuple):
    """Of one W in evaluation, float64, on the CPU.

    Attributes:
        eigenvalues: of each group in ascending order, (G, d); at most 1.5^T.
        condition: ratio of the largest and smallest absolute eigenvalue, (G,).
    """
    eigenvalues: Tensor
    condition: Tensor


def spectra(model: nn.Module) -> Dict[str, Spectrum]:
    """Spectrum of the running W of every CE layer with a BD branch (equation 6).

    In the order of the model's modules.
    """
    found = {}
    for name, ce in ce_layers(model).items():
        if not ce.has_bd:
            continue
        whitening = ce.running_whitening.double().cpu()
        # It is symmetric up to rounding, as a polynomial of a symmetric matrix.
        eigenvalues = torch.linalg.eigvalsh((whitening + whitening.mT) / 2)
        sizes = eigenvalues.abs()
        found[name] = Spectrum(eigenvalues, sizes.amax(-1) / sizes.amin(-1))
    return found


class Spread(NamedTuple):
    """Standard deviation of w_n over images (biased) divided by its mean, and the channels' mean.

    `per_channel` is (C,), float64, on the CPU.
    """
    per_channel: Tensor
    mean: float


class ReweightingSpread(Collector):
    """Spread over images of the IR weights w_n (equation 8); a `Collector`.

    0 means that all images get the same weights, so that IR is a static scaling.

    Args:
        model: a network with CE, in evaluation mode.
        layers: names of CE layers, or regular expressions for whole names; None for all with IR.

    Raises:
        InputError: there is no such layer, a pattern matches none, or one is in training mode.
    """

    def __init__(self, model: nn.Module, layers: Layers = None) -> None:
        with_ir = {name: ce for name, ce in ce_layers(model).items() if ce.has_ir}
        chosen = select(with_ir, layers, 'CE layer with an IR branch')
        owners = {ce.reweighting: ce for ce in chosen.values()}

        def new(reweighting):
            def columns(_, gates):  # F(v_n), which is w_n up to s, as (C, N, 1)
                check_running_statistics(owners[reweighting])
                return gates.mT.unsqueeze(-1)
            return RunningCovariance(columns)

        super().__init__(model, {name: ce.reweighting for name, ce in chosen.items()}, new)

    def result(self) -> Dict[str, Spread]:
        """By CE layer, in the order of calls; an InputError unless finite, and of two images."""
        found = {}
        for label, gates in self.statistics().items():
            if gates.count < 2:
                raise InputError(f'{label}: {gates.count} images were seen, '
                                 'a spread needs at least two')
            deviation, mean = gates.covariance.flatten().sqrt(), gates.mean.flatten()
            per_channel = check_finite(label, deviation / mean).cpu()
            found[label] = Spread(per_channel, per_channel.mean().item())
        return found
