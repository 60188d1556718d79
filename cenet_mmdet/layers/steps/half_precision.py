"""Step 4 of a CE layer in half precision.

float16 ends at 65504, and two things that the step needs may lie beyond it though its
result does not:

- The gradient of a matrix is a sum over all pixels. Like batch norm's, it is float32 here.
- Where a channel hardly varies about a large mean, M x and M mean are both large. Here the
  matrix is applied to x - c, where c is the mean as half precision has it, so nothing but
  the deviations is multiplied, which also keeps their digits. Both are halved, as the
  difference of two numbers may be twice the largest one.
"""
from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

HALF = (torch.float16, torch.bfloat16)


def half_product(matrix: Tensor, x: Tensor) -> Tensor:
    """M x: float32 (B, d, d) by half precision (B, d, L), which it returns."""
    return _HalfProduct.apply(matrix, None, None, x)


def half_centred_product(matrix: Tensor, mean: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """M (x - mean) + b, with float32 (B, d, d), (B, d, 1), (B, d, 1) and half precision x."""
    half_mean = (0.5 * mean.detach()).to(x.dtype)  # c / 2
    # What rounding did to M acts on what rounding did to the mean, and so on nothing large.
    rounded = matrix + (_rounded(matrix, x.dtype) - matrix).detach()
    bias = bias - rounded @ (mean - 2 * half_mean.to(mean.dtype))
    return _HalfProduct.apply(matrix, bias, half_mean, x)


def _rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype).to(matrix.dtype)


class _HalfProduct(Function):
    """M x, or M (x - c) + b: in half precision, with gradients of M and b in float32."""
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, bias: Optional[Tensor], half_mean: Optional[Tensor],
                x: Tensor) -> Tensor:
        if bias is None:
            return matrix.to(x.dtype) @ x
        halved = torch.add(-half_mean, x, alpha=0.5)
        return torch.baddbmm(bias.to(x.dtype), 2 * matrix.to(x.dtype), halved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: Any) -> None:
        matrix, _, half_mean, x = inputs
        ctx.save_for_backward(matrix, half_mean, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        matrix, half_mean, x = ctx.saved_tensors
        grad_x = matrix.mT.to(grad.dtype) @ grad
        grad, centred = grad.to(matrix.dtype), x.to(matrix.dtype)
        if half_mean is None:
            return grad @ centred.mT, None, None, grad_x
        centred = centred - 2 * half_mean.to(matrix.dtype)
        return grad @ centred.mT, grad.sum(-1, keepdim=True), None, grad_x
