"""Step 4 of a CE layer: apply the operator to the feature map.

Neither function centres the features: the operator acts on x, not on x - mean.
"""
from torch import Tensor


def apply_operator(operator: Tensor, x: Tensor) -> Tensor:
    """p = operator @ x: (N, G, d, d) or (G, d, d) by (N, G, d, L), as one batched product."""
    return operator.to(x.dtype) @ x


def apply_weights(weights: Tensor, x: Tensor) -> Tensor:
    """p = diag(weights) x: (N, G, d) by (N, G, d, L)."""
    return weights.to(x.dtype).unsqueeze(-1) * x
