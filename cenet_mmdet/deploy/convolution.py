"""A convolution, its batch norm and CE as one operation, for inference.

With W2 the convolution's weights times gamma / sigma, and b2 what is left of the norm as
a bias, CE's input is x = W2 u + b2, and its output

    p_n = [lambda W + (1 - lambda) diag(w_n)] x_n = M_n u_n + c_n
    M_n = W1 + (1 - lambda) diag(w_n) W2        W1 = lambda W W2
    c_n = b1 + (1 - lambda) w_n b2              b1 = lambda W b2

BD alone is merged into the weights for good (the paper's section 3.1). IR looks at the
variances of x; for a 1x1 convolution they follow from the covariance S_n of u,

    v_n = diag(W2 S_n W2^T)

so that x, which has four times the channels of u in a bottleneck, is never made, and
p takes one batched product, as the convolution by itself.
"""
from typing import Union

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import CE
from ..layers.steps.moments import instance_moments, safe_count
from ..utils.compat import is_exporting

# The products that make M_n and v_n do not depend on the number of pixels; below this many
# for each of u's channels, x and CE's own four steps are cheaper (measured on two CPU cores).
PIXELS_PER_CHANNEL = 1.3


def fold(conv: nn.Conv2d, norm: nn.Module, ce: CE) -> Union[nn.Conv2d, 'CEConv2d']:
    """A module that computes ce(norm(conv(u))), all in evaluation mode.

    Returns:
        A convolution for BD alone, else a `CEConv2d`.
    """
    conv = fuse_conv_bn_eval(conv, norm)
    if ce.has_ir:
        return CEConv2d(conv, ce)
    weight, bias = _decorrelated(conv, ce)
    conv.weight.data, conv.bias.data = weight.view_as(conv.weight), bias
    return conv


class CEConv2d(nn.Module):
    """A convolution and the CE behind it, for inference only.

    Args:
        conv: the convolution, with the norm folded into it.
        ce: the CE layer with IR, in evaluation mode.

    Shape:
        - Input: (N, C_in, H, W), of which N, H and W may be 0 or more.
        - Output: (N, C, H_out, W_out), in the input's type and memory format where the
          convolution is 1x1; variances and the algebra on them are float32 or float64.
    """

    def __init__(self, conv: nn.Conv2d, ce: CE) -> None:
        super().__init__()
        self.conv = conv
        self.ce = ce
        ratio = ce.ratio(torch.float64)
        self.bd_share = ratio.item() if isinstance(ratio, Tensor) else ratio  # lambda
        weight, bias = _decorrelated(conv, ce) if ce.has_bd else (
            torch.zeros_like(conv.weight.flatten(1)), torch.zeros_like(conv.bias))
        self.register_buffer('bd_weight', self.bd_share * weight, persistent=False)  # W1
        self.register_buffer('bd_bias', self.bd_share * bias, persistent=False)  # b1
        self.eval()

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution is a matrix product at every pixel."""
        conv = self.conv
        return (conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)
                and conv.groups == 1)

    def forward(self, u: Tensor) -> Tensor:
        if self.is_pointwise and self._is_large(u):
            with torch.autocast(u.device.type, enabled=False):
                return self._without_x(u)
        return self.ce(self.conv(u))

    def _is_large(self, u: Tensor) -> bool:
        # An exported program has one form for all sizes.
        return (is_exporting()
                or u.shape[2] * u.shape[3] > PIXELS_PER_CHANNEL * u.shape[1])

    def _without_x(self, u: Tensor) -> Tensor:
        maps = u.flatten(2)  # (N, C_in, L)
        per_sample = instance_moments(maps.unsqueeze(1), has_bd=True, has_ir=False)
        dtype = per_sample.mean.dtype
        weight, bias = self.conv.weight.flatten(1).to(dtype), self.conv.bias.to(dtype)  # W2, b2
        covariance = per_sample.scatter[:, 0] / safe_count(per_sample.pixels - 1)  # S_n
        # v_n = diag(W2 S_n W2^T), (N, C); rounding may leave it below 0
        variance = ((weight @ covariance) * weight).sum(-1).clamp(min=0)
        weights = self.ce.reweighting(variance) / self.ce.running_scale.to(dtype)  # w_n, eq. 8
        weights = (1 - self.bd_share) * weights
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


def _decorrelated(conv: nn.Conv2d, ce: CE):
    """W W2 as (C, C_in * k * k), and W b2."""
    whitening = ce.running_whitening.double()
    grouped = conv.weight.detach().double().view(ce.num_groups, ce.group_size, -1)
    weight = (whitening @ grouped).flatten(0, 1)
    bias = (whitening @ conv.bias.detach().double().view(ce.num_groups, ce.group_size, 1)).flatten()
    return weight.to(conv.weight.dtype), bias.to(conv.bias.dtype)
