"""Step 4 of a CE layer: apply the operator to the feature map.

Half precision has `half_precision.py`.
"""
from typing import Tuple

import torch
from torch import Tensor

from .half_precision import HALF, half_centred_product, half_product


def apply_operator(operator: Tensor, x: Tensor) -> Tensor:
    """p_n = M_n x_n.

    Args:
        operator: M, (N, G, d, d), or (G, d, d) for one operator for all samples.
        x: grouped feature map (N, G, d, L).
    """
    if x.dtype in HALF:
        matrix, rows = _batch(operator, x)
        return half_product(matrix, rows).view(x.shape)
    return operator @ x


def apply_centred(matrix: Tensor, mean: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """M_n (x_n - mean) + b_n.

    Args:
        matrix: M, (N, G, d, d) or (G, d, d).
        mean: (G, d).
        bias: b, (N, G, d) or (G, d).
        x: grouped feature map (N, G, d, L).
    """
    if x.dtype not in HALF:
        return _affine(matrix, bias - (matrix @ mean.unsqueeze(-1)).squeeze(-1), x)
    matrix, rows = _batch(matrix, x)
    mean, bias = (vector.expand(x.shape[:3]).reshape(*rows.shape[:2], 1) for vector in (mean, bias))
    return half_centred_product(matrix, mean, bias, rows).view(x.shape)


def apply_behind(operator: Tensor, scale: Tensor, mean: Tensor, shift: Tensor,
                 x: Tensor) -> Tensor:
    """M_n (scale * (x_n - mean) + shift), where all but x_n are small.

    Args:
        operator: M, (N, G, d, d) or (G, d, d).
        scale, mean, shift: of the affine map in front of it, (G, d).
        x: grouped feature map (N, G, d, L).
    """
    matrix = operator * scale.unsqueeze(-2)
    if x.dtype in HALF:
        return apply_centred(matrix, mean, (operator @ shift.unsqueeze(-1)).squeeze(-1), x)
    offset = shift - scale * mean
    return _affine(matrix, (operator @ offset.unsqueeze(-1)).squeeze(-1), x)


def _affine(matrix: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """M_n x_n + b_n."""
    matrix, rows = _batch(matrix, x)
    bias = bias.expand(x.shape[:3]).reshape(*rows.shape[:2], 1)
    return torch.baddbmm(bias, matrix, rows).view(x.shape)


def apply_weights(weights: Tensor, x: Tensor) -> Tensor:
    """p_n = diag(w_n) x_n: (N, G, d) by grouped feature map (N, G, d, L)."""
    # In float32 also for half precision: the weights' gradient is a sum over the pixels.
    return (weights.unsqueeze(-1) * x).to(x.dtype)


def _batch(matrix: Tensor, x: Tensor) -> Tuple[Tensor, Tensor]:
    """Matrices and feature map with samples and groups as one batch: (B, d, d), (B, d, L)."""
    n, groups, d, pixels = x.shape
    return (matrix.expand(n, groups, d, d).reshape(n * groups, d, d),
            x.reshape(n * groups, d, pixels))
