"""Batch decorrelation (BD): the whitening matrix of section 3.1.

Small algebra on d x d matrices; nothing here sees the feature map.
"""
import torch
from torch import Tensor

from .moments import BatchMoments


def covariance(batch: BatchMoments, eps: float) -> Tensor:
    """Biased covariance over all samples and pixels, plus eps * I: (G, d, d)."""
    d = batch.scatter.shape[-1]
    identity = torch.eye(d, dtype=batch.scatter.dtype, device=batch.scatter.device)
    pixels = torch.as_tensor(batch.pixels).clamp(min=1)  # none: all ranks are empty
    return batch.scatter / pixels + eps * identity


def newton_whitening(sigma: Tensor, num_iters: int) -> Tensor:
    """Newton's iteration for the inverse square root of sigma / trace(sigma), eq. 6.

    Like the paper, and unlike IterNorm, this does not multiply by
    trace(sigma)^(-1/2) afterwards. The gain is at most 1.5^num_iters, so T = 3
    is far from an inverse root, by design; beyond T of about 10 the iteration
    amplifies its own rounding.

    Args:
        sigma: covariance matrices, (G, d, d).
        num_iters: number of iterations T, at least 1.

    Returns:
        The whitening matrices W, (G, d, d).
    """
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)
    sigma_n = sigma / trace[..., None, None]
    identity = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    p = 1.5 * identity - 0.5 * sigma_n  # P_1; P_0 = I needs no product
    for _ in range(num_iters - 1):
        # P_{k+1} = 1.5 P_k - 0.5 P_k^3 Sigma_N
        p = torch.baddbmm(p, p @ p, p @ sigma_n, beta=1.5, alpha=-0.5)
    return p
