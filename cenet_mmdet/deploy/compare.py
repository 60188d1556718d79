"""Run a model on an example, and compare its outputs with those of another."""
import copy
import math
from collections import Counter
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

import torch
from torch import Tensor, nn

# Largest deviation that rounding explains, relative to an output's largest value
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def run(model: nn.Module, example: Any) -> Any:
    """The model's output for an example: a tuple of arguments, a dict of them, or the only one."""
    example = copy.deepcopy(example)  # a model may change its input
    kwargs = example if isinstance(example, dict) else {}
    args = () if kwargs else example if isinstance(example, tuple) else (example, )
    # TF32, the default of convolutions on a GPU, rounds more than the tolerance.
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with torch.no_grad(), exact:
        return model(*args, **kwargs)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors(value)


def deviation(ours: List[Tensor], expected: List[Tensor]) -> float:
    """Largest difference, relative to the largest value of its tensor; inf for other shapes."""
    if [a.shape for a in ours] != [b.shape for b in expected]:
        return math.inf
    largest = 0.
    for a, b in zip(ours, expected):
        a, b = a.double(), b.double()
        difference = torch.where(a == b, 0., (a - b).abs()).nan_to_num(nan=math.inf)
        if difference.any():
            largest = max(largest, float(difference.max() / b.abs().nan_to_num(0., 0.).max()))
    return largest


def first_difference(model: nn.Module, folded: nn.Module, example: Any,
                     inside: Set[str], tolerance: float) -> Tuple[str, float]:
    """Name of the first module whose output differs, and the deviation.

    Args:
        model, folded: hooks are left on both.
        example: as for `run`.
        inside: names of modules whose outputs are meant to differ.
        tolerance: deviations up to it are none.
    """
    expected, found = _outputs(model, example, inside), _outputs(folded, example, set())
    for key, outputs in expected.items():
        kept = [i for i, output in enumerate(outputs) if output is not None]
        ours = found.get(key, outputs)
        difference = deviation([ours[i] for i in kept], [outputs[i] for i in kept])
        if not difference <= tolerance:
            return key[0], difference
    return 'the model', math.inf


def _outputs(model: nn.Module, example: Any,
             inside: Set[str]) -> Dict[Tuple[str, int], List[Optional[Tensor]]]:
    """Outputs of all calls, in the order in which they end, by module and number of the call.

    None stands for an output of a module `inside`, which a container may return too.
    """
    calls, found = Counter(), {}

    def after(name: str, outputs: List[Tensor]) -> None:
        calls[name] += 1
        for output in outputs:
            output.is_inside = name in inside or getattr(output, 'is_inside', False)
        found[name, calls[name]] = [None if o.is_inside else o.clone() for o in outputs]

    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: after(name or 'the model', list(tensors(output))))
    run(model, example)
    return found
