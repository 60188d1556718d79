"""Step 4 of a CE layer: apply the operator to the feature map.

Neither function centres the features: the operator acts on x, not on x - mean.
"""
import torch
from torch import Tensor


def apply_operator(operator: Tensor, x: Tensor) -> Tensor:
    """p_n = operator_n x_n as one batched product.

    Args:
        operator: (N, G, d, d), or (G, d, d) for one operator for all samples.
        x: feature map (N, C, ...), C = G * d.
    """
    groups, d = operator.shape[-3:-1]
    grouped = x.reshape(len(x), groups, d, x.shape[2:].numel())
    # The product is new, so its other shape need not be a view: residual blocks
    # add to it in place, which autograd handles at a cost, or not at all, in views.
    return torch.ops.aten._unsafe_view(operator.to(x.dtype) @ grouped, x.shape)


def apply_weights(weights: Tensor, x: Tensor) -> Tensor:
    """p_n = diag(w_n) x_n: (N, G, d) by feature map (N, C, ...)."""
    return weights.to(x.dtype).reshape(x.shape[:2] + (1, ) * (x.dim() - 2)) * x
