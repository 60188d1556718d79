"""The norms' gamma, and what batch decorrelation makes of it (section 3.3, Proposition 1)."""
from typing import Dict, Mapping, NamedTuple, Optional

from torch import Tensor, nn

from ..layers import CE
from ..layers.steps.whitening import newton_whitening
from .channels import INHIBITED, check_threshold, share_below
from .collector import Collector, check_finite, feature_map, module_name
from .modules import norms
from .running_moments import RunningCovariance, pixels


class Gamma(NamedTuple):
    """Of one norm.

    Attributes:
        magnitude: |gamma|, (C,), float64, on the CPU.
        effective: |W gamma|, (C,), of a norm that CE with a BD branch follows, else None.
        threshold: smaller ones count as small.
    """
    magnitude: Tensor
    effective: Optional[Tensor]
    threshold: float

    @property
    def share(self) -> float:
        """Share of channels whose |gamma| is below the threshold."""
        return share_below(self.magnitude, self.threshold)

    @property
    def effective_share(self) -> Optional[float]:
        """The same of |W gamma|."""
        return None if self.effective is None else share_below(self.effective, self.threshold)


def gammas(model: nn.Module, pairs: Optional[Mapping[str, str]] = None,
           threshold: float = INHIBITED) -> Dict[str, Gamma]:
    """|gamma| of every norm that has one; with CE behind it, also the equivalent gamma of BD.

    BD alone turns gamma into W gamma (section 3.3), with the W of evaluation, which is the
    layer's `running_whitening`. Until it was trained or loaded, that is I.

    Args:
        model: any network.
        pairs: what `norm_ce_pairs` found; None leaves `effective` out.
        threshold: a |gamma| below it counts as small.

    Returns:
        By the norms' names, in the order of the model's modules.

    Raises:
        ValueError: if no norm has a gamma, `pairs` is of another network, or the threshold
            is not positive.
    """
    check_threshold(threshold)
    affine = {name: norm for name, norm in norms(model).items() if _gamma(norm) is not None}
    if not affine:
        raise ValueError('the model has no norm with a gamma: batch, instance or group norm '
                         'with affine=True')
    followers = {norm: ce for norm, (_, ce) in _modules(model, pairs or {}).items()}
    return {name: Gamma(_gamma(norm).abs(), _effective(norm, followers.get(name)), threshold)
            for name, norm in affine.items()}


class Growth(NamedTuple):
    """Proposition 1 at one CE layer: gamma and gamma_hat, (C,), float64, on the CPU."""
    gamma: Tensor
    gamma_hat: Tensor

    @property
    def share(self) -> float:
        """Share of channels with |gamma_hat| > |gamma|; part (1) says 1."""
        return (self.gamma_hat.abs() > self.gamma.abs()).double().mean().item()

    @property
    def ratio(self) -> float:
        """|gamma_hat| / |gamma|, the l2 norms over channels; NaN if all gamma are 0."""
        return (self.gamma_hat.norm() / self.gamma.norm()).item()


class GammaGrowth(Collector):
    """Whether BD increases gamma, as Proposition 1 has it; used as Collector says.

    gamma_hat = W gamma, where W is Newton's iteration (equation 6, the layer's own number
    of steps) for the covariance gamma gamma^T * rho of the norm's output (equation 5),
    which is taken from all images seen. Nothing is asserted: part (1), that |gamma_hat|
    exceeds |gamma| in every channel, is exact for one Newton step only.

    Args:
        model: a network with CE.
        pairs: what `norm_ce_pairs` found.

    Raises:
        ValueError: if no pair has a norm with a gamma and a CE with a BD branch, or
            `pairs` is of another network; and as Collector.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, str]) -> None:
        found = _modules(model, pairs)
        self._pairs = {pairs[name]: (norm, ce) for name, (norm, ce) in found.items()
                       if ce.has_bd and _gamma(norm) is not None}
        if not self._pairs:
            raise ValueError('pairs holds no norm with a gamma in front of a CE with a BD branch; '
                             'make it by norm_ce_pairs, of a network that has them')
        super().__init__(model, {name: ce for name, (_, ce) in self._pairs.items()})

    def _new(self, name: str) -> '_GroupCovariance':
        return _GroupCovariance(self._pairs[name][1].num_groups)

    def result(self) -> Dict[str, Growth]:
        """By the names of the CE layers, in the order of calls.

        Raises:
            ValueError: if no image was seen, or the values are infinite.
        """
        found = {}
        for label, statistics in self._by_label().items():
            norm, ce = self._pairs[module_name(label)]
            covariance = check_finite(label, statistics.sigma.moment).cpu()
            gamma = _gamma(norm)
            whitening = newton_whitening(covariance, ce.identity.cpu(), ce.eps, ce.num_iters)
            found[label] = Growth(gamma, _apply(whitening, gamma))
        return found


class _GroupCovariance:
    """Covariance of the CE layer's input, (G, d, d)."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.sigma = RunningCovariance()

    def add(self, inputs, output) -> None:
        rows = pixels(feature_map(inputs[0]))
        self.sigma.add(rows.unflatten(1, (self.groups, -1)).transpose(0, 1))


def _gamma(norm: nn.Module) -> Optional[Tensor]:
    weight = getattr(norm, 'weight', None)
    return None if weight is None else weight.detach().double().cpu()


def _effective(norm: nn.Module, ce: Optional[CE]) -> Optional[Tensor]:
    if ce is None or not ce.has_bd:
        return None
    return _apply(ce.running_whitening.double().cpu(), _gamma(norm)).abs()


def _apply(whitening: Tensor, gamma: Tensor) -> Tensor:
    """(G, d, d) by (C,) -> (C,), C = G * d."""
    groups, size, _ = whitening.shape
    return (whitening @ gamma.view(groups, size, 1)).flatten()


def _modules(model: nn.Module, pairs: Mapping[str, str]):
    """{name of the norm: (norm, CE)} of a model."""
    modules = dict(model.named_modules())
    for names in pairs.items():
        for name in names:
            if name not in modules:
                raise ValueError(f'pairs names {name!r}, which the model does not have; '
                                 'make it by norm_ce_pairs of this model')
    return {norm: (modules[norm], modules[ce]) for norm, ce in pairs.items()}
