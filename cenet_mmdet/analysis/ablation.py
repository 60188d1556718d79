"""Cumulative ablation of random channels (section 5.2, Figures 1c and 4c; Morcos et al., 2018)."""
from contextlib import contextmanager
from functools import partial
from typing import Callable, Dict, Iterator, Sequence, Union

import torch
from torch import Tensor, nn

from ..models.insert import NormCE, channels_of
from .collector import feature_map
from .modules import ce_layers, evaluating, norms_with_ce, select
from .norm_ce_pairs import mark, origin_of


@contextmanager
def zero_channels(model: nn.Module, layers: Union[str, Sequence[str]], fraction: float,
                  seed: int) -> Iterator[None]:
    """Inside the `with` statement, random channels of the norms' outputs are zero.

    Where CE follows a norm directly, those of CE's output are: CE would mix others into
    channels that were zeroed in front of it. The channels depend on the seed and the layers
    chosen, and those of a smaller fraction are among those of a larger one. Afterwards,
    and after exceptions too, the model is what it was.

    Args:
        model: any network.
        layers: names of norms, or regular expressions that match all of a name. A norm
            with CE from `insert_ce` goes by the name of the norm that it was.
        fraction: share of each layer's channels to zero, in [0, 1], rounded to a number.
        seed: of the choice of channels.

    Raises:
        ValueError: for a fraction out of its range, or a pattern that matches no norm; by
            the model, if it runs under inference_mode and has CE.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f'fraction must lie in [0, 1], got {fraction!r}')
    chosen = select(norms_with_ce(model), layers, 'norm')
    ablation = _Ablation(_random_channels(chosen, fraction, seed))
    handles = [layer.register_forward_hook(partial(ablation.after_norm, name))
               for name, layer in chosen.items()]
    for ce in ce_layers(model).values():
        handles += [ce.register_forward_pre_hook(ablation.before_ce),
                    ce.register_forward_hook(ablation.after_ce)]
        ablation.has_ce = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablation_curve(model: nn.Module, evaluate: Callable[[nn.Module], float],
                   layers: Union[str, Sequence[str]], fractions: Sequence[float],
                   seeds: Sequence[int]) -> Tensor:
    """What is left of a metric as more and more channels are zeroed.

    Args:
        model: any network; in evaluation mode during `evaluate`, its modes are restored.
        evaluate: returns a number for the model, such as its accuracy. It is called
            `len(seeds) * len(fractions)` times.
        layers, fractions, seeds: as in `zero_channels`. The figures ablate the first
            norms of a network.

    Returns:
        (seeds, fractions), float64; in the unit of the metric.

    Raises:
        ValueError: without any fraction or seed, and as `zero_channels`.
    """
    fractions, seeds = list(fractions), list(seeds)
    if not fractions or not seeds:
        raise ValueError(f'a curve needs at least one fraction and one seed, got '
                         f'fractions={fractions} and seeds={seeds}')
    curve = torch.empty(len(seeds), len(fractions), dtype=torch.float64)
    with evaluating(model):
        for i, seed in enumerate(seeds):
            for j, fraction in enumerate(fractions):
                with zero_channels(model, layers, fraction, seed):
                    curve[i, j] = float(evaluate(model))
    return curve


def _random_channels(chosen: Dict[str, nn.Module], fraction: float, seed: int) -> Dict[str, Tensor]:
    """For each layer, which of its channels to zero: (C,), bool."""
    generator = torch.Generator().manual_seed(seed)
    dead = {}
    for name, layer in chosen.items():
        channels = channels_of(layer.norm if isinstance(layer, NormCE) else layer)
        # The order does not depend on the fraction, so the sets are nested.
        order = torch.randperm(channels, generator=generator)
        dead[name] = torch.zeros(channels, dtype=torch.bool)
        dead[name][order[:round(fraction * channels)]] = True
    return dead


class _Ablation:
    """The hooks. A zeroed output carries the whole one with it, for a CE that may follow."""

    def __init__(self, dead: Dict[str, Tensor]) -> None:
        self.dead = dead
        self.has_ce = False
        self.pending = {}  # channels to zero in the output of the CE layer that is running

    def after_norm(self, name: str, layer, inputs, output) -> Tensor:
        zeroed = _zero(feature_map(output), self.dead[name])
        if self.has_ce:
            mark(zeroed, (output, self.dead[name]))
        return zeroed

    def before_ce(self, ce, inputs):
        self.pending.pop(ce, None)
        origin = origin_of(inputs[0])
        if origin is None:
            return None
        whole, self.pending[ce] = origin
        return (whole, *inputs[1:])

    def after_ce(self, ce, inputs, output):
        return _zero(output, self.pending.pop(ce)) if ce in self.pending else output


def _zero(x: Tensor, dead: Tensor) -> Tensor:
    return x.masked_fill(dead.to(x.device).view(-1, *[1] * (x.dim() - 2)), 0)
