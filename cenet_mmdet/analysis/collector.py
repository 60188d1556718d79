"""Statistics of layers, gathered by hooks while a network runs."""
from collections import Counter
from functools import partial
from typing import Any, Callable, Dict

import torch
from torch import Tensor, nn

from ..utils.errors import InputError


class Collector:
    """Base class of the measurements that run along with a network; use it in a `with` statement.

        with Measurement(model) as measurement:
            for images in batches:
                model(images)
        measurement.result()

    Memory does not grow with the number of images: each layer keeps sums in float64. A layer that
    one forward pass of the model calls several times, like the one rectifier of a residual block,
    counts as one layer for each call: `name#1`, `name#2`. So all passes must make the same calls.
    Calls outside of a pass, as of a checkpointed block in the backward pass, do not count. The
    model keeps its mode: call `model.eval()` first to measure what it does in evaluation.

    Args:
        model: the module that will be called as a whole.
        layers: the layers to hook, by name.
        new: returns empty statistics for a layer, with a method `add(inputs, output)`.

    Raises:
        InputError: a pass makes other calls than the first, or the one before it did not finish.
    """

    def __init__(self, model: nn.Module, layers: Dict[str, nn.Module],
                 new: Callable[[nn.Module], Any]) -> None:
        self._model = model
        self._layers = layers
        self._new = new
        self._handles = []
        self._statistics = {}  # by (name, number of the call), in the order of calls
        self._all_calls = None  # how often each layer is called in a pass
        self._calls = None  # so far in the current pass

    def __enter__(self):
        self._handles.append(self._model.register_forward_pre_hook(self._start))
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._record, name)))
        # Last, because the model may itself be one of the layers.
        self._handles.append(self._model.register_forward_hook(self._finish))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _start(self, model, inputs) -> None:
        self._check_finished()
        self._calls = Counter()

    def _record(self, name: str, layer, inputs, output) -> None:
        if self._calls is None:
            return
        self._calls[name] += 1
        key = name, self._calls[name]
        if key not in self._statistics:
            self._statistics[key] = self._new(layer)
        device_type = output.device.type if isinstance(output, Tensor) else 'cpu'
        # Mixed precision is for the model, not for what is measured.
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            try:
                self._statistics[key].add(inputs, output)
            except InputError as error:
                raise InputError(f'{name}: {error}') from None

    def _finish(self, model, inputs, output) -> None:
        calls = self._calls
        first = calls if self._all_calls is None else self._all_calls
        for name in {**first, **calls}:
            if first[name] != calls[name]:
                raise InputError(f'{name} was called {calls[name]} times in this forward pass and '
                                 f'{first[name]} times in the first, so its calls cannot be told '
                                 'apart; choose other layers by `layers`')
        self._all_calls, self._calls = first, None

    def _check_finished(self) -> None:
        if self._calls is not None:
            raise InputError('a forward pass did not finish, or made other calls than the first, '
                             'and the sums hold a part of it; measure again from the start')

    def statistics(self) -> Dict[str, Any]:
        """By layer and call, in the order of calls; an InputError without a finished pass."""
        self._check_finished()
        if not self._statistics:
            raise InputError('no image was seen: call the model itself, not a part of it, inside '
                             f'the `with` statement of {type(self).__name__}, on images that '
                             'pass through the chosen layers')
        return {name if self._all_calls[name] == 1 else f'{name}#{call}': statistics
                for (name, call), statistics in self._statistics.items()}


def module_name(label: str) -> str:
    """The name of the layer in a label, which is `name` or `name#call`."""
    return label.partition('#')[0]


def feature_map(x: Any) -> Tensor:
    """x, if it is a feature map (N, C, ...); else an InputError."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        found = f'shape {tuple(x.shape)}' if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f'expected a tensor (N, C, ...), got {found}; choose other layers')
    return x


def check_finite(label: str, values: Tensor) -> Tensor:
    """The values, which are means over images; an InputError if they are not finite."""
    if not values.isfinite().all():
        raise InputError(f'{label}: the layer computed infinite values, NaN, or none at all; '
                         'check the weights and the images')
    return values
