"""Norms as other libraries write them."""
import torch
from torch import nn
from torch.nn import functional as F


class BatchNormAct2d(nn.BatchNorm2d):
    """With an activation of its own, as in timm."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and detectron2; DETR's has no attribute for its eps."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in dict(weight=1, bias=0, running_mean=0, running_var=1).items():
            self.register_buffer(name, torch.full((channels, ), float(value)))

    def forward(self, x):
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (self.running_var + getattr(self, 'eps', 1e-5)).rsqrt()
        return x * scale.view(shape) + (self.bias - self.running_mean * scale).view(shape)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + 'num_batches_tracked', None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DetrFrozenBatchNorm2d(FrozenBatchNorm2d):

    def __init__(self, channels):
        super().__init__(channels)
        del self.eps


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (N, C, H, W), as in timm and torchvision's ConvNeXt."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias,
                            self.eps).permute(0, 3, 1, 2)


class ConvNeXtLayerNorm(nn.Module):
    """No nn.LayerNorm, and of either kind, as in the code of ConvNeXt."""

    def __init__(self, channels, channels_first=True):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(
            torch.zeros(channels))
        self.normalized_shape, self.channels_first = (channels, ), channels_first

    def forward(self, x):
        if not self.channels_first:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]
