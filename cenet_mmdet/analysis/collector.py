"""Statistics of layers, gathered by hooks while a network runs."""
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..utils.errors import InputError


class Collector:
    """Base class of the measurements that run along with a network; use it in a `with` statement.

        with Measurement(model) as measurement:
            for images in batches:
                model(images)
        measurement.result()

    Memory does not grow with the number of images. If the model calls a layer several times in a
    pass, each call counts as a layer: `name#1`, `name#2`. Calls outside of a pass do not count,
    such as those of checkpointing in the backward pass.

    Args:
        model: the module that is called as a whole. It keeps its mode.
        layers: the layers to measure, by name.
        measure: takes (layer, inputs, output, before) and returns the layer's statistics. `before`
            are those of the passes before, or None.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module],
                 measure: Callable[[Any, Any, Tensor, Any], Any]) -> None:
        self._model = model
        self._layers: Mapping[str, Any] = layers
        self._measure = measure
        self._found: Dict[Tuple[str, int], Any] = {}  # by name and number of the call
        self._calls: Optional[Counter] = None  # of each layer so far, inside a pass

    def __enter__(self) -> Any:
        self._handles = [self._model.register_forward_pre_hook(self._start),
                         *(layer.register_forward_hook(partial(self._record, name))
                           for name, layer in self._layers.items()),
                         # Last, because the model may itself be one of the layers.
                         self._model.register_forward_hook(self._finish)]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, *_: Any) -> None:
        self._calls = Counter()

    def _finish(self, *_: Any) -> None:
        self._calls = None

    def _record(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._calls is None:
            return
        self._calls[name] += 1
        key = name, self._calls[name]
        try:
            if not isinstance(output, Tensor):
                raise InputError('its output is no feature map (N, C, ...); choose another layer')
            # Mixed precision is for the model, not for what is measured.
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._found[key] = self._measure(layer, inputs, output, self._found.get(key))
        except InputError as error:
            raise InputError(f'{name}: {error}') from None

    def statistics(self) -> Dict[str, Any]:
        """By layer and call, in the order of calls; an InputError if no layer was called."""
        if self._layers and not self._found:
            raise InputError('no image was seen: call the model itself, not a part of it, inside '
                             'the `with` statement, on images that pass through the layers')
        return {f'{name}#{call}' if (name, 2) in self._found else name: found
                for (name, call), found in self._found.items()}


def module_name(label: str) -> str:
    """The name of the layer in a label, which is `name` or `name#call`."""
    return label.partition('#')[0]


def pixels(x: Tensor) -> Tensor:
    """Feature map (N, C, ...) -> (M, C), one row for each position of each image."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


class Moments(NamedTuple):
    """Of M rows (..., M, C): mean (..., C) and biased covariance (..., C, C), float64.

    `rounding` is the relative error of the rows, from their type.
    """
    rows: int
    mean: Tensor
    covariance: Tensor
    rounding: float


def moments(rows: Tensor, before: Optional[Moments] = None) -> Moments:
    """Moments of rows and of all rows before them, combined as in Chan et al. (1983).

    An InputError is raised if there is no row, or one is not finite.
    """
    count, rounding, rows = rows.shape[-2], torch.finfo(rows.dtype).eps, rows.double()
    mean = rows.mean(-2, keepdim=True)
    if not mean.isfinite().all():
        raise InputError('the layer computed infinite values, NaN, or none at all; '
                         'check the weights and the images')
    deviation = rows - mean
    covariance = deviation.mT @ deviation / count
    if before is not None:
        shift = mean - before.mean.unsqueeze(-2)
        count += before.rows
        old = before.rows / count
        mean = mean - old * shift
        covariance = torch.lerp(covariance, before.covariance, old)
        covariance += old * (1 - old) * shift.mT @ shift
    return Moments(count, mean.squeeze(-2), covariance, rounding)


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[List[str]]:
    """A list that gets a sentence on the first module called with inf or NaN in its output.

    Torch's hook for all modules is used, because a batch norm and CE with hooks of their own would
    not be computed in one. These two are not called then: the module behind them is found.
    """
    names = {module: name for name, module in model.named_modules() if name}
    found: List[str] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and module in names and not is_finite(output):
            advice = ('its input is finite, so check its weights' if is_finite(inputs) else
                      'its input has them too, so check the images and what comes before it')
            found.append(f'{names[module]} ({type(module).__name__}) is the first module with inf '
                         f'or NaN in its output, and {advice}')

    with register_module_forward_hook(look):
        yield found


def is_finite(value: Any) -> bool:
    """Whether a tensor, or all tensors in (nested) lists and dicts, have neither inf nor NaN."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (Tensor, float)) or bool(torch.as_tensor(value).isfinite().all())
