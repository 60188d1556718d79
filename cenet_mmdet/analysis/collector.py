"""Statistics of layers, gathered by hooks while a network runs."""
from collections import Counter
from functools import partial
from typing import Any, Dict

import torch
from torch import Tensor, nn


class Collector:
    """What all streaming measurements have in common; use it in a `with` statement.

        with Measurement(model) as measurement:
            for images in batches:
                model(images)
        measurement.result()

    Memory does not grow with the number of images: each layer keeps sums, in float64. A
    layer that is called several times in one forward pass of the model, like the one
    rectifier of a residual block, counts as one layer for each call: `name#1`, `name#2`.
    So the passes must make the same calls. What is called outside of a pass is left
    alone: parts of the model, or a checkpointed block that the backward pass repeats.

    The model keeps the mode it is in; call `model.eval()` first to measure what it does
    in evaluation, and to leave its running statistics as they are.

    Args:
        model: the whole of what will be called.
        layers: the layers to hook, by name.

    Raises:
        ValueError: during a pass that makes other calls than the first, or after one
            that did not finish; by `result`, if it was that, or if there was none.
    """

    def __init__(self, model: nn.Module, layers: Dict[str, nn.Module]) -> None:
        self._model = model
        self._layers = layers
        self._handles = []
        self._statistics = {}  # by (name, number of the call), in the order of calls
        self._all_calls = None  # how often each layer is called in a pass
        self._calls = None  # as yet, in the pass under way

    def _new(self, name: str) -> Any:
        """Empty statistics of a layer, with `add(inputs, output)`."""
        raise NotImplementedError

    def __enter__(self):
        self._handles.append(self._model.register_forward_pre_hook(self._start))
        for name, layer in self._layers.items():
            hook = partial(self._record, name)
            self._handles.append(layer.register_forward_hook(hook))
        # Last, for the case that the model is itself one of the layers.
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
            self._statistics[key] = self._new(name)
        # Mixed precision is for the model, not for what is measured.
        with torch.no_grad(), torch.autocast(self._device_type(output), enabled=False):
            try:
                self._statistics[key].add(inputs, output)
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from None

    @staticmethod
    def _device_type(output) -> str:
        return output.device.type if isinstance(output, Tensor) else 'cpu'

    def _finish(self, model, inputs, output) -> None:
        if self._all_calls is None:
            self._all_calls = self._calls
        differing = [name for name in {**self._all_calls, **self._calls}
                     if self._all_calls[name] != self._calls[name]]
        if differing:
            name = differing[0]
            raise ValueError(f'{name} was called {self._calls[name]} times in this forward pass '
                             f'and {self._all_calls[name]} times in the first, so its calls '
                             'cannot be told apart; choose other layers by `layers`')
        self._calls = None

    def _check_finished(self) -> None:
        if self._calls is not None:
            raise ValueError('a forward pass did not finish, or made other calls than the first: '
                             'the sums hold a part of it; measure again from the start')

    def _by_label(self) -> Dict[str, Any]:
        """The statistics of each layer and call, in the order of calls."""
        self._check_finished()
        if not self._statistics:
            raise ValueError('no image was seen: call the model itself, not a part of it, inside '
                             f'the `with` statement of {type(self).__name__}, on images that '
                             'pass through the layers chosen')
        return {self._label(*key): value for key, value in self._statistics.items()}

    def _label(self, name: str, call: int) -> str:
        return name if self._all_calls[name] == 1 else f'{name}#{call}'


def module_name(label: str) -> str:
    """The name of the layer that `name` or `name#call` is about."""
    return label.partition('#')[0]


def feature_map(x: Any) -> Tensor:
    """x, if it is a feature map (N, C, ...)."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        found = f'shape {tuple(x.shape)}' if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f'expected a tensor (N, C, ...), got {found}; choose other layers')
    return x


def check_finite(label: str, values: Tensor) -> Tensor:
    """The values, which are means over images; a ValueError where there is none."""
    if not values.isfinite().all():
        raise ValueError(f'{label}: the layer computed infinite values, NaN, or none at all; '
                         'check the weights and the images')
    return values
