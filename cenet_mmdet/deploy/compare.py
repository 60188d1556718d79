"""Run a model on an example, and compare its outputs with those of another."""
import copy
import math
from typing import Any, Dict, Iterator, List, Mapping

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


def outputs_by_module(model: nn.Module, example: Any) -> Dict[str, List[Tensor]]:
    """Outputs of the modules without submodules, in all calls; their hooks stay on the model."""
    outputs: Dict[str, List[Tensor]] = {}
    for name, module in model.named_modules():
        if not module._modules:
            module.register_forward_hook(lambda _, inputs, output, name=name: outputs.setdefault(
                name, []).extend(tensor.clone() for tensor in tensors(output)))
    run(model, example)
    return outputs
