"""A convolution, its batch norm and CE as one operation, for inference.

With W2 the convolution's weights times gamma / sigma, and b2 the bias that is left of the norm,
CE's input is x = W2 u + b2, and its output

    p_n = [A + a diag(w_n)] x_n = M_n u_n + c_n       A = lambda W, a = 1 - lambda
    M_n = W1 + a diag(w_n) W2                         W1 = A W2
    c_n = b1 + a w_n b2                               b1 = A b2

BD alone is merged into the weights for good (section 3.1). IR needs the variances of x; for a 1x1
convolution they follow from the covariance S_n of u,

    v_n = diag(W2 S_n W2^T)

so that x, which has four times the channels of u in a bottleneck, is never made.
"""
import copy
import math
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import CE
from ..layers.steps.moments import centred_scatter, safe_count
from ..utils.compat import is_exporting

# The cost of M_n and v_n does not depend on the number of pixels. Below this many for each of u's
# channels, x and CE's own four steps are cheaper (measured on two CPU cores).
PIXELS_PER_CHANNEL = 1.3


@torch.no_grad()
def fold(layer: Any, norm: Any, ce: Optional[CE]) -> nn.Module:
    """A layer, or else a `CEConv2d`, that computes ce(norm(layer(u))) in evaluation mode.

    `layer` is a convolution, not transposed, or a linear layer; `norm` a batch norm with running
    statistics; `ce` may be None.
    """
    dtype = layer.weight.dtype
    layer, norm = (copy.deepcopy(module).double().eval() for module in (layer, norm))
    layer = fuse_conv_bn_eval(layer, norm).to(dtype)
    if ce is None:
        return layer
    # BD that mixes channels of several groups of a convolution is not merged into it, which would
    # need larger groups: behind a depthwise 3x3, 9d products for each output, while BD has d.
    if ce.has_ir or ce.num_groups % getattr(layer, 'groups', 1):
        return CEConv2d(layer, ce)
    layer.weight.data, layer.bias.data = _multiplied(_operator_parts(ce)[0], layer)
    return layer


class CEConv2d(nn.Module):
    """A convolution or linear layer and the CE behind it, for inference only.

    Args:
        conv: the layer, with the norm folded into it.
        ce: in evaluation mode.

    Shape:
        - Input: (N, C_in, H, W), or with fewer or more spatial dimensions.
        - Output: (N, C, H_out, W_out), in the input's type and memory format where the
          convolution is 1x1; variances and the algebra on them are float32 or float64.
    """
    bd_weight: Tensor
    bd_bias: Tensor

    @torch.no_grad()
    def __init__(self, conv: Any, ce: CE) -> None:
        super().__init__()
        self.conv: Any = conv
        self.ce = ce
        # whether it is a matrix product at every pixel
        self.is_pointwise = not isinstance(conv, nn.Linear) and (
            {*conv.kernel_size, *conv.stride, conv.groups} == {1}
            and (isinstance(conv.padding, str) or not any(conv.padding)))
        if ce.has_ir and self.is_pointwise:
            matrix, self.ir_share = _operator_parts(ce)  # A, a
            weight, bias = _multiplied(matrix, conv)
            self.register_buffer('bd_weight', weight.flatten(1), persistent=False)  # W1
            self.register_buffer('bd_bias', bias, persistent=False)  # b1
        self.eval()

    def forward(self, u: Tensor) -> Tensor:
        # An exported program has one form for all sizes.
        if self.ce.has_ir and self.is_pointwise and (
                is_exporting() or math.prod(u.shape[2:]) > PIXELS_PER_CHANNEL * u.shape[1]):
            with torch.autocast(u.device.type, enabled=False):
                return self._without_x(u)
        return self.ce(self.conv(u))

    def _without_x(self, u: Tensor) -> Tensor:
        maps = u.flatten(2)  # (N, C_in, L)
        mean, scatter = centred_scatter(maps)
        dtype = mean.dtype
        weight, bias = self.conv.weight.flatten(1).to(dtype), self.conv.bias.to(dtype)  # W2, b2
        covariance = scatter / safe_count(maps.shape[-1] - 1)  # S_n
        # v_n = diag(W2 S_n W2^T), (N, C); rounding may leave it below 0
        variance = ((weight @ covariance) * weight).sum(-1).clamp(min=0)
        # a w_n, eq. 8
        weights = self.ir_share * self.ce.weights(variance, self.ce.running_scale.to(dtype))
        matrix = torch.addcmul(self.bd_weight.to(dtype), weights.unsqueeze(-1), weight)  # M_n
        shift = torch.addcmul(self.bd_bias.to(dtype), weights, bias)  # c_n
        matrix, shift = matrix.to(u.dtype), shift.to(u.dtype)
        if u.is_contiguous():
            out = torch.baddbmm(shift.unsqueeze(-1), matrix, maps)
        else:  # channels_last: the pixels' channels lie side by side, and shall in the output
            out = torch.baddbmm(shift.unsqueeze(-2), maps.mT, matrix.mT).mT
        return out.unflatten(-1, u.shape[2:])

    def train(self, mode: bool = True) -> 'CEConv2d':
        if mode:
            raise RuntimeError('this model was folded for inference by fuse_ce and cannot be '
                               'trained; build it anew from its config and checkpoint')
        return super().train(False)


def _operator_parts(ce: CE) -> Tuple[Tensor, float]:
    """A (G, d, d), in float64, and a, where CE in evaluation is p_n = [A + a diag(w_n)] x_n."""
    ratio = float(ce.ratio(torch.float64))
    strength = float(ce.strength) if ce.identity_start else 1.
    identity = torch.eye(ce.group_size, dtype=torch.float64, device=ce.num_batches_tracked.device)
    matrix = ((1 - strength) * identity).repeat(ce.num_groups, 1, 1)
    if ce.has_bd:
        matrix += strength * ratio * ce.running_whitening.double()
    return matrix, strength * (1 - ratio)


def _multiplied(matrix: Tensor, layer: Any) -> Iterator[Tensor]:
    """A W2 and A b2 for A (G, d, d), in the shapes of the layer's weights and bias."""
    for parameter in (layer.weight, layer.bias):
        grouped = parameter.double().reshape(*matrix.shape[:2], -1)
        yield (matrix @ grouped).to(parameter.dtype).view_as(parameter)
