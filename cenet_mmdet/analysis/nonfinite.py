"""The module of a network at which values stop being finite."""
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


class FirstNonFinite:
    """Finds the first module of a model, in the order of calls, with inf or NaN in its output.

    Used in a `with` statement around forward passes. Torch's hook for all modules watches them,
    because hooks of their own would keep a batch norm and CE from being computed in one. Those two
    are not called then: the module behind them is found, with an input that is not finite.

    Attributes:
        name: of the module, with its class; None if there is no such module.
        input_is_finite: whether its input has neither inf nor NaN.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules() if name}
        self.name: Optional[str] = None
        self.input_is_finite = True

    def __enter__(self) -> 'FirstNonFinite':
        self._handle = register_module_forward_hook(self._look)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()

    def _look(self, module: nn.Module, inputs, output) -> None:
        if self.name is None and module in self._names and not is_finite(output):
            self.name = f'{self._names[module]} ({type(module).__name__})'
            self.input_is_finite = is_finite(inputs)


def is_finite(value: Any) -> bool:
    """Whether a tensor, or all tensors in (nested) lists and dicts, have neither inf nor NaN."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (Tensor, float)) or bool(torch.as_tensor(value).isfinite().all())
