"""How many operations a computation takes: on a GPU each is a kernel launch, whatever its size."""
from collections import Counter
from typing import Any, Callable, Tuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Views compute nothing.
VIEWS = ('view', '_unsafe_view', 'reshape', '_reshape_alias', 'expand', 't', 'transpose', 'permute',
         'unsqueeze', 'squeeze', 'slice', 'select', 'detach', 'alias', 'as_strided', 'split',
         'split_with_sizes', 'unbind', 'diagonal', 'lift_fresh', 'unfold')


class CountOperations(TorchDispatchMode):
    """Counts the operations that torch dispatches inside a `with` statement, by name.

    Attributes:
        operations: e.g. `Counter({'bmm': 3, 'add': 1})`; views and empty tensors are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Tuple = (), kwargs: Any = None):
        name = str(function).split('.')[1]
        if name not in VIEWS and not name.startswith('empty'):
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))


def count_operations(forward: Callable[[], Tensor], backward: bool) -> Tuple[Counter, Counter]:
    """Operations of a forward pass, and of the backward pass of its output.

    Args:
        forward: computes an output.
        backward: whether to count the backward pass, too.
    """
    with CountOperations() as counted:
        out = forward()
    ahead, back = counted.operations, CountOperations()
    if backward:
        gradient = out.new_ones(out.shape)
        with back:
            out.backward(gradient)
    return ahead, back.operations
