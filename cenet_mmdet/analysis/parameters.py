"""What is learned: gamma, and what BD makes of it (section 3.3, Proposition 1), W and lambda."""
from typing import Any, Dict, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..layers.steps.whitening import newton_whitening
from .channels import INHIBITED, share_below
from .collector import Collector, module_name, moments, pixels
from .modules import ce_layers, norms


class Gamma(NamedTuple):
    """|gamma| of a norm and, if CE with BD follows it, |W gamma|; (C,), float64, on the CPU.

    `share` and `effective_share` are the shares of channels in which they are small.
    """
    magnitude: Tensor
    share: float
    effective: Optional[Tensor] = None
    effective_share: Optional[float] = None


def gammas(model: nn.Module, pairs: Optional[Mapping[str, str]] = None,
           threshold: float = INHIBITED) -> Dict[str, Gamma]:
    """|gamma| of every norm that has one, in the order of the model's modules.

    `pairs` is the result of `norm_ce_pairs`. With it, there are also the gammas that BD makes of
    them: W gamma, with the W of evaluation (section 3.3). An InputError is raised unless the
    threshold is positive.
    """
    layers, found = ce_layers(model), {}
    for name, norm in norms(model).items():
        if getattr(norm, 'weight', None) is None:
            continue
        gamma = _gamma(norm)
        found[name] = Gamma(gamma.abs(), share_below(gamma.abs(), threshold))
        ce = layers.get((pairs or {}).get(name))
        if ce is not None and ce.has_bd:
            effective = _product(ce.running_whitening, gamma).abs()
            found[name] = Gamma(*found[name][:2], effective, share_below(effective, threshold))
    return found


class Growth(NamedTuple):
    """Proposition 1 at one CE layer: gamma and gamma_hat, (C,), float64, on the CPU.

    `share` is the share of channels with |gamma_hat| > |gamma|. `ratio` is |gamma_hat| / |gamma|,
    the l2 norms over the channels; NaN if all gamma are 0.
    """
    gamma: Tensor
    gamma_hat: Tensor
    share: float
    ratio: float


class GammaGrowth(Collector):
    """Whether BD increases gamma, as Proposition 1 states; a `Collector`.

    gamma_hat = W gamma. W is Newton's iteration (equation 6) on the covariance gamma gamma^T * rho
    of the norm's output (equation 5), over all images. Nothing is asserted: part (1), |gamma_hat| >
    |gamma| in all channels, is exact for one step only. `pairs` is the result of `norm_ce_pairs`.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, str]) -> None:
        self._norms = {pairs[name]: norms(model)[name] for name, found
                       in gammas(model, pairs).items() if found.effective is not None}
        layers = {name: ce for name, ce in ce_layers(model).items() if name in self._norms}
        # (G, M, d): each group by itself
        super().__init__(model, layers, lambda ce, inputs, output, before: moments(
            pixels(inputs[0]).unflatten(1, (ce.num_groups, -1)).transpose(0, 1), before))

    def result(self) -> Dict[str, Growth]:
        """By the names of the CE layers with BD behind a gamma, in the order of calls."""
        found = {}
        for label, x in self.statistics().items():
            name = module_name(label)
            ce, gamma = self._layers[name], _gamma(self._norms[name])
            whitening = newton_whitening(x.covariance, ce.identity, ce.eps, ce.num_iters)
            gamma_hat = _product(whitening, gamma)
            raised = (gamma_hat.abs() > gamma.abs()).double().mean()
            found[label] = Growth(gamma, gamma_hat, raised.item(),
                                  (gamma_hat.norm() / gamma.norm()).item())
        return found


def _gamma(norm: Any) -> Tensor:
    return norm.weight.detach().double().cpu()


def _product(whitening: Tensor, gamma: Tensor) -> Tensor:
    """(G, d, d) by (C,) -> (C,), C = G * d."""
    return (whitening.to(gamma) @ gamma.view(len(whitening), -1, 1)).flatten()


@torch.no_grad()
def lambdas(model: nn.Module) -> Dict[str, float]:
    """lambda, the weight of BD against IR in [0, 1], of every CE layer (equation 4, Table 4)."""
    return {name: float(ce.ratio(torch.float64)) for name, ce in ce_layers(model).items()}


class Spectrum(NamedTuple):
    """Eigenvalues of one W by group, ascending, (G, d), at most 1.5^T; float64, on the CPU.

    `condition` is the ratio of the largest and smallest absolute eigenvalue, (G,).
    """
    eigenvalues: Tensor
    condition: Tensor


def spectra(model: nn.Module) -> Dict[str, Spectrum]:
    """Spectrum of the W of evaluation of every CE layer with BD (equation 6)."""
    found = {}
    for name, ce in ce_layers(model).items():
        if ce.has_bd:
            # W is symmetric up to rounding; eigvalsh reads one triangle.
            eigenvalues = torch.linalg.eigvalsh(ce.running_whitening.double().cpu())
            sizes = eigenvalues.abs()
            found[name] = Spectrum(eigenvalues, sizes.amax(-1) / sizes.amin(-1))
    return found
