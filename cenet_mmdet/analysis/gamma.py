"""The norms' gamma, and what batch decorrelation makes of it (section 3.3, Proposition 1)."""
from functools import partial
from typing import Dict, Mapping, NamedTuple, Optional

from torch import Tensor, nn

from ..layers import CE
from ..layers.steps.whitening import newton_whitening
from ..utils.errors import InputError
from .channels import INHIBITED, check_threshold, share_below
from .collector import Collector, check_finite, feature_map, module_name
from .modules import ce_layers, norms
from .running_moments import RunningCovariance, pixels


class Gamma(NamedTuple):
    """|gamma| of a norm and, if CE with BD follows it, |W gamma|; (C,), float64, on the CPU."""
    magnitude: Tensor
    effective: Optional[Tensor]
    threshold: float

    @property
    def share(self) -> float:
        """Share of channels whose |gamma| is below the threshold."""
        return share_below(self.magnitude, self.threshold)

    @property
    def effective_share(self) -> Optional[float]:
        """The same for |W gamma|."""
        return None if self.effective is None else share_below(self.effective, self.threshold)


def gammas(model: nn.Module, pairs: Optional[Mapping[str, str]] = None,
           threshold: float = INHIBITED) -> Dict[str, Gamma]:
    """|gamma| of every norm that has one; with CE behind it, also the equivalent gamma of BD.

    BD alone turns gamma into W gamma (section 3.3), with the W of evaluation.

    Args:
        model: any network.
        pairs: the result of `norm_ce_pairs`; None leaves `effective` out.
        threshold: a |gamma| below it counts as small.

    Returns:
        By the norms' names, in the order of the model's modules.

    Raises:
        InputError: `pairs` belongs to another network, or the threshold is not positive.
    """
    check_threshold(threshold)
    followers, found = _followers(model, pairs or {}), {}
    for name, gamma in _gammas(model).items():
        ce = followers.get(name)
        effective = None
        if ce is not None and ce.has_bd:
            effective = _apply(ce.running_whitening.double().cpu(), gamma).abs()
        found[name] = Gamma(gamma.abs(), effective, threshold)
    return found


class Growth(NamedTuple):
    """Proposition 1 at one CE layer: gamma and gamma_hat, (C,), float64, on the CPU."""
    gamma: Tensor
    gamma_hat: Tensor

    @property
    def share(self) -> float:
        """Share of channels with |gamma_hat| > |gamma|, which is 1 in part (1)."""
        return (self.gamma_hat.abs() > self.gamma.abs()).double().mean().item()

    @property
    def ratio(self) -> float:
        """|gamma_hat| / |gamma|, the l2 norms over channels; NaN if all gamma are 0."""
        return (self.gamma_hat.norm() / self.gamma.norm()).item()


class GammaGrowth(Collector):
    """Whether BD increases gamma, as Proposition 1 states; a `Collector`.

    gamma_hat = W gamma. W is Newton's iteration (equation 6, with the layer's number of steps) on
    the covariance gamma gamma^T * rho of the norm's output (equation 5), over all images seen.
    Nothing is asserted: part (1), |gamma_hat| > |gamma| in every channel, is exact for one Newton
    step only. `pairs` is the result of `norm_ce_pairs`.

    Raises:
        InputError: no pair has a norm with a gamma and a CE with a BD branch, or `pairs` belongs
            to another network.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, str]) -> None:
        gamma = _gammas(model)
        followers = {name: ce for name, ce in _followers(model, pairs).items()
                     if ce.has_bd and name in gamma}
        if not followers:
            raise InputError('pairs holds no norm with a gamma in front of a CE with a BD branch; '
                             'make it by norm_ce_pairs, from a network that has them')
        self._gamma = {pairs[name]: gamma[name] for name in followers}
        super().__init__(model, {pairs[name]: ce for name, ce in followers.items()},
                         lambda ce: RunningCovariance(partial(_rows, ce)))

    def result(self) -> Dict[str, Growth]:
        """By the names of the CE layers, in the order of calls; an InputError unless finite."""
        found = {}
        for label, sums in self.statistics().items():
            name = module_name(label)
            ce, gamma = self._layers[name], self._gamma[name]
            covariance = check_finite(label, sums.covariance).cpu()
            whitening = newton_whitening(covariance, ce.identity.cpu(), ce.eps, ce.num_iters)
            found[label] = Growth(gamma, _apply(whitening, gamma))
        return found


def _rows(ce: CE, inputs: tuple, output: Tensor) -> Tensor:
    """(N, C, ...) -> (G, M, d)."""
    return pixels(feature_map(inputs[0])).unflatten(1, (ce.num_groups, -1)).transpose(0, 1)


def _gammas(model: nn.Module) -> Dict[str, Tensor]:
    return {name: norm.weight.detach().double().cpu() for name, norm in norms(model).items()
            if getattr(norm, 'weight', None) is not None}


def _apply(whitening: Tensor, gamma: Tensor) -> Tensor:
    """(G, d, d) by (C,) -> (C,), C = G * d."""
    groups, size, _ = whitening.shape
    return (whitening @ gamma.view(groups, size, 1)).flatten()


def _followers(model: nn.Module, pairs: Mapping[str, str]) -> Dict[str, CE]:
    """{name of the norm: CE}."""
    layers = ce_layers(model)
    for norm, ce in pairs.items():
        if ce not in layers or norm not in norms(model):
            raise InputError(f'pairs names {norm!r} and {ce!r}, which are no norm and CE layer of '
                             'the model; make it by norm_ce_pairs, from this model')
    return {norm: layers[ce] for norm, ce in pairs.items()}
