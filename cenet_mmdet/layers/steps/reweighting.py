"""Step 3 of a CE layer, instance reweighting (IR): the channel weights of section 3.2."""
from typing import Any, Dict, List, Optional, Union

import torch
from torch import Tensor, nn


class InstanceReweighting(nn.Sequential):
    """The subnetwork F: per-sample variances (N, C) -> channel gates in (0, 1), (N, C).

    Linear -> LayerNorm -> ReLU -> Linear -> Sigmoid with a bottleneck of C / reduction, as in SE
    and GC blocks (section 3.2, released code).
    """

    def __init__(self, channels: int, reduction: int,
                 device: Union[torch.device, str, None] = None,
                 dtype: Optional[torch.dtype] = None) -> None:
        hidden = max(channels // reduction, 1)
        factory: Dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(
            nn.Linear(channels, hidden, bias=False, **factory),
            nn.LayerNorm(hidden, **factory),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False, **factory),
            nn.Sigmoid())

    def forward(self, variance: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return super().forward(variance.to(dtype)).to(variance.dtype)

    def reset_parameters(self) -> None:
        layers: List[Any] = [self[0], self[1], self[3]]
        for layer in layers:
            layer.reset_parameters()


def instance_scale(variance: Tensor, eps: float) -> Tensor:
    """s, the root mean square deviation over samples and channels (eq. 8): scalar.

    The mean variance is at least eps, so that a constant input cannot make the weights F(v) / s
    infinite.

    Args:
        variance: v_n, or means of v_n over samples: (..., G, d).
        eps: a positive number.
    """
    return variance.mean().clamp(min=eps).sqrt()
