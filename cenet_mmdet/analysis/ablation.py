"""Cumulative ablation of random channels (section 5.2, Figures 1c and 4c; Morcos et al., 2018)."""
from contextlib import contextmanager
from functools import partial
from typing import Callable, Dict, Iterator, Mapping, Sequence, Union

import torch
from torch import Tensor, nn

from ..models.insert import channels_of
from ..utils.errors import InputError
from .collector import feature_map
from .modules import ce_layers, evaluating, norms, select
from .norm_ce_pairs import mark, origin_of


@contextmanager
def zero_channels(model: nn.Module, layers: Union[str, Sequence[str]], fraction: float,
                  seed: int) -> Iterator[None]:
    """Inside the `with` statement, random channels of the norms' outputs are zero.

    If CE follows a norm directly, channels of CE's output are zero instead, because CE would mix
    other channels into those that were zeroed in front of it. The channels depend on the seed and
    the layers; those of a smaller fraction are among those of a larger one.

    Args:
        model: any network; restored at the end, and after exceptions.
        layers: names of norms, or regular expressions for whole names.
        fraction: share of each layer's channels to zero, in [0, 1].
        seed: of the random choice.

    Raises:
        InputError: the fraction is out of its range, or a pattern matches no norm; in the model,
            under inference_mode.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f'fraction must lie in [0, 1], got {fraction!r}')
    chosen = select(norms(model), layers, 'norm')
    followers = ce_layers(model).values()
    ablation = _Ablation(_random_channels(chosen, fraction, seed), has_ce=bool(followers))
    handles = [layer.register_forward_hook(partial(ablation.after_norm, name))
               for name, layer in chosen.items()]
    for ce in followers:
        handles += [ce.register_forward_pre_hook(ablation.before_ce),
                    ce.register_forward_hook(ablation.after_ce)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablation_curve(model: nn.Module,
                   evaluate: Callable[[nn.Module], Union[float, Mapping[str, float]]],
                   layers: Union[str, Sequence[str]], fractions: Sequence[float],
                   seeds: Sequence[int]) -> Union[Tensor, Dict[str, Tensor]]:
    """Metrics of a network as more and more of its channels are zeroed.

    Args:
        model: any network; in evaluation mode during `evaluate`, its modes are restored.
        evaluate: returns a metric of the model, such as its accuracy, or several by their names.
        layers, fractions, seeds: as in `zero_channels`. The paper's figures ablate the first
            norms of a network.

    Returns:
        (seeds, fractions), float64, in the unit of the metric; a dict of these if `evaluate`
        returns a dict. A metric that a call does not return is NaN there.

    Raises:
        InputError: there is no fraction or no seed; and as `zero_channels`.
    """
    fractions, seeds = list(fractions), list(seeds)
    if not fractions or not seeds:
        raise InputError('a curve needs at least one fraction and one seed, got '
                         f'fractions={fractions} and seeds={seeds}')
    results = []
    with evaluating(model):
        for seed in seeds:
            for fraction in fractions:
                with zero_channels(model, layers, fraction, seed):
                    results.append(evaluate(model))
    single = not isinstance(results[0], Mapping)
    if single:
        results = [{'': result} for result in results]
    curves = {}
    for name in dict.fromkeys(name for result in results for name in result):
        values = [float(result.get(name, float('nan'))) for result in results]
        curves[name] = torch.tensor(values, dtype=torch.float64).view(-1, len(fractions))
    return curves[''] if single else curves


def _random_channels(chosen: Dict[str, nn.Module], fraction: float, seed: int) -> Dict[str, Tensor]:
    """Which channels of each layer to zero: (C,), bool."""
    generator = torch.Generator().manual_seed(seed)
    dead = {}
    for name, layer in chosen.items():
        channels = channels_of(layer)
        # The order does not depend on the fraction, so the sets are nested.
        order = torch.randperm(channels, generator=generator)
        dead[name] = torch.zeros(channels, dtype=torch.bool)
        dead[name][order[:round(fraction * channels)]] = True
    return dead


class _Ablation:
    """The hooks. A zeroed output carries the whole one along, for a CE that may follow."""

    def __init__(self, dead: Dict[str, Tensor], has_ce: bool) -> None:
        self.dead = dead
        self.has_ce = has_ce
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
