"""Step 4 of a CE layer: apply the operator to the feature map.

CE's operator acts on x, not on x - mean. Behind a batch norm that is computed with it
(`batch_norm.py`), the feature map is the norm's input, and the norm a part of the operator.
"""
from typing import Optional

import torch
from torch import Tensor

from .batch_norm import Affine


def apply_operator(operator: Tensor, x: Tensor, affine: Optional[Affine] = None) -> Tensor:
    """p_n = operator_n x_n as one batched product.

    Args:
        operator: (N, G, d, d), or (G, d, d) for one operator for all samples.
        x: feature map (N, C, ...), C = G * d; with `affine`, the one that it maps to x.
        affine: what lies between the feature map and x.
    """
    groups, d = operator.shape[-3:-1]
    grouped = x.reshape(len(x), groups, d, x.shape[2:].numel())
    if affine is not None:
        return torch.ops.aten._unsafe_view(_apply_affine(operator, affine, grouped), x.shape)
    # The product is new, so its other shape need not be a view: residual blocks
    # add to it in place, which autograd handles at a cost, or not at all, in views.
    return torch.ops.aten._unsafe_view(operator.to(x.dtype) @ grouped, x.shape)


def _apply_affine(operator: Tensor, affine: Affine, z: Tensor) -> Tensor:
    """operator (scale * (z - mean) + shift) as M z + b, for z (N, G, d, L)."""
    matrix = (operator * affine.scale.unsqueeze(-2)).to(z.dtype)
    # b is made of the M that is applied, rounded to half precision or not: an error of M
    # then acts on z - mean, and not on an offset of z.
    bias = (operator @ affine.shift.unsqueeze(-1)
            - matrix.to(operator.dtype) @ affine.mean.unsqueeze(-1))
    n, groups, d, pixels = z.shape
    matrix, bias = (t.expand(n, groups, d, -1).reshape(n * groups, d, -1)
                    for t in (matrix, bias.to(z.dtype)))
    return torch.baddbmm(bias, matrix, z.reshape(n * groups, d, pixels))


def apply_weights(weights: Tensor, x: Tensor) -> Tensor:
    """p_n = diag(w_n) x_n: (N, G, d) by feature map (N, C, ...)."""
    return weights.to(x.dtype).reshape(x.shape[:2] + (1, ) * (x.dim() - 2)) * x
