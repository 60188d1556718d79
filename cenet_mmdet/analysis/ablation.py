"""Cumulative ablation of random channels (section 5.2, Figures 1c and 4c; Morcos et al., 2018)."""
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Sequence, Union

import torch
from torch import Tensor, nn

from ..models.insert import channels_of
from ..utils.errors import InputError
from .modules import ce_layers, evaluating, mark, norms, origin_of, select


@contextmanager
def zero_channels(model: nn.Module, layers: Union[str, Sequence[str]], fraction: float,
                  seed: int) -> Iterator[None]:
    """Inside the `with` statement, random channels of the norms' outputs are zero.

    If CE follows a norm directly, channels of CE's output are zero instead, because CE would mix
    other channels into those that were zeroed in front of it. `layers` names norms, see `select`.
    `fraction` is the share of each norm's channels, in [0, 1]; else there is an InputError. `seed`
    chooses them: those of a smaller fraction are among those of a larger one.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f'fraction must lie in [0, 1], got {fraction!r}')
    dead: Dict[nn.Module, Tensor] = {}
    followers = ce_layers(model).values()

    def after_norm(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        zeroed = output.index_fill(1, dead[norm].to(output.device), 0)
        if followers:  # which take the whole output
            mark(zeroed, (output, dead[norm]))
        return zeroed

    def before_ce(ce: nn.Module, inputs: Any) -> Any:
        whole, dead[ce] = origin_of(inputs[0]) or (inputs[0], torch.tensor([], dtype=torch.long))
        return (whole, *inputs[1:])

    def after_ce(ce: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, dead[ce].to(output.device), 0)

    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as hooks:
        for norm in select(norms(model), layers, 'norm').values():
            # The order does not depend on the fraction, so the sets are nested.
            order = torch.randperm(channels_of(norm), generator=generator)
            dead[norm] = order[:round(fraction * len(order))]
            hooks.enter_context(norm.register_forward_hook(after_norm))
        for ce in followers:
            hooks.enter_context(ce.register_forward_pre_hook(before_ce))
            hooks.enter_context(ce.register_forward_hook(after_ce))
        yield


def ablation_curve(model: nn.Module,
                   evaluate: Callable[[nn.Module], Union[float, Mapping[str, float]]],
                   layers: Union[str, Sequence[str]], fractions: Sequence[float],
                   seeds: Sequence[int]) -> Union[Tensor, Dict[str, Tensor]]:
    """Metrics of a network as more and more of its channels are zeroed.

    Args:
        model: any network; in evaluation mode during `evaluate`, its modes are restored.
        evaluate: returns a metric of the model, such as its accuracy, or several by their names.
        layers, fractions, seeds: as in `zero_channels`; the paper ablates the first norms.

    Returns:
        (seeds, fractions), float64, in the unit of the metric; a dict of these if `evaluate`
        returns a dict. A metric that a call does not return is NaN there.
    """
    results: List[Any] = []
    with evaluating(model):
        for seed in seeds:
            for fraction in fractions:
                with zero_channels(model, layers, fraction, seed):
                    results.append(evaluate(model))

    def curve(values: Iterable[Any]) -> Tensor:
        return torch.tensor([float(v) for v in values], dtype=torch.float64).view(len(seeds), -1)

    if not isinstance(results[0], Mapping):
        return curve(results)
    names = dict.fromkeys(name for result in results for name in result)
    return {name: curve(result.get(name, float('nan')) for result in results) for name in names}
