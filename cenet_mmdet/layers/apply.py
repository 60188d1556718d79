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
        x: grouped feature map (N, G, d, L); with `affine`, the one that it maps to x.
        affine: what lies between the feature map and x.
    """
    if affine is None:
        return operator.to(x.dtype) @ x
    return _apply_affine(operator, affine, x)


def _apply_affine(operator: Tensor, affine: Affine, z: Tensor) -> Tensor:
    """operator (scale * (z - mean) + shift) as M z + b, for z (N, G, d, L)."""
    matrix = (operator * affine.scale.unsqueeze(-2)).to(z.dtype)
    # b is made of the M that is applied, rounded to half precision or not: an error of M
    # then acts on z - mean, and not on an offset of z.
    bias = (operator @ affine.shift.unsqueeze(-1)
            - matrix.to(operator.dtype) @ affine.mean.unsqueeze(-1))
    n, groups, d, pixels = z.shape
    matrix = matrix.expand(n, groups, d, d).reshape(n * groups, d, d)
    bias = bias.to(z.dtype).expand(n, groups, d, 1).reshape(n * groups, d, 1)
    return torch.baddbmm(bias, matrix, z.reshape(n * groups, d, pixels)).view(z.shape)


def apply_weights(weights: Tensor, x: Tensor) -> Tensor:
    """p_n = diag(w_n) x_n: (N, G, d) by grouped feature map (N, G, d, L)."""
    return weights.to(x.dtype).unsqueeze(-1) * x
