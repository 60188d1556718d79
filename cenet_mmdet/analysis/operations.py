"""How many operations a computation takes: on a GPU each is a kernel launch, whatever its size."""
from collections import Counter
from typing import Any, Callable, Tuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Views compute nothing, nor does a check of torch 2.1's backward pass.
VIEWS = ('view', '_unsafe_view', 'reshape', '_reshape_alias', 'expand', 't', 'transpose', 'permute',
         'unsqueeze', 'squeeze', 'slice', 'select', 'detach', 'alias', 'as_strided', 'split',
         'split_with_sizes', 'unbind', 'diagonal', 'lift_fresh', 'unfold', 'is_same_size')


class CountOperations(TorchDispatchMode):
    """Counts operations inside a `with` statement, by name, without views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        name = str(function).split('.')[1]
        if name not in VIEWS and not name.startswith('empty'):
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))


def count_operations(forward: Callable[[], Tensor], backward: bool) -> Tuple[Counter, Counter]:
    """Operations of what computes an output and, if `backward`, of the output's backward pass."""
    with CountOperations() as ahead:
        out = forward()
    gradient = out.new_ones(out.shape)
    with CountOperations() as back:
        if backward:
            out.backward(gradient)
    return ahead.operations, back.operations
