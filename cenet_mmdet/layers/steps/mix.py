"""Step 3 of a CE layer: both branches mixed into one d x d operator per sample and group."""
from typing import Union

import torch
from torch import Tensor


def mix(ratio: Union[Tensor, float], whitening: Tensor, weights: Tensor,
        identity: Tensor) -> Tensor:
    """D_n^(-1/2) of eq. 4: lambda * W + (1 - lambda) * diag(w_n).

    Args:
        ratio: lambda, a scalar.
        whitening: W, (G, d, d).
        weights: w_n, (N, G, d).
        identity: I, (d, d).

    Returns:
        The operator of every sample and group, (N, G, d, d).
    """
    return torch.lerp(weights.unsqueeze(-1) * identity.to(weights.dtype), whitening, ratio)
