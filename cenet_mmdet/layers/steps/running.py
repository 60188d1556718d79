"""Running averages of a layer's statistics."""
from typing import Sequence, Tuple

import torch
from torch import Tensor


def read(running: Tensor, dtype: torch.dtype) -> Tensor:
    """A running average in the type of the statistics."""
    # A copy where gradients are recorded: another forward in training may update the buffer
    # before the backward pass.
    return running.to(dtype, copy=torch.is_grad_enabled())


@torch.no_grad()
def track(averages: Sequence[Tuple[Tensor, Tensor]], momentum: float, counter: Tensor,
          finite: Tensor) -> None:
    """running = (1 - momentum) * running + momentum * new, and count the batch, if it is finite.

    Args:
        averages: pairs of a running average and the new value, of the same number of elements.
        momentum: weight of the new values.
        counter: number of batches so far.
        finite: whether it is, a bool tensor. Nobody asks for its value, which would wait for a
            GPU.
    """
    running = [average for average, _ in averages]
    new = [torch.where(finite, value.view(average.shape).to(average.dtype), average)
           for average, value in averages]
    torch._foreach_lerp_(running, new, momentum)
    counter.add_(finite)
