"""Batch decorrelation (BD): the whitening matrix of section 3.1.

Small algebra on d x d matrices; nothing here sees the feature map.
"""
import torch
from torch import Tensor

from .moments import BatchMoments, at_least_one


def covariance(batch: BatchMoments, eps: float) -> Tensor:
    """Biased covariance over all samples and pixels, plus eps * I: (G, d, d)."""
    return torch.add(batch.scatter / at_least_one(batch.pixels), _identity(batch.scatter),
                     alpha=eps)


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
    p = torch.sub(1.5 * _identity(sigma), sigma_n, alpha=0.5)  # P_1; P_0 = I needs no product
    for _ in range(num_iters - 1):
        # P_{k+1} = 1.5 P_k - 0.5 P_k^3 Sigma_N
        p = torch.baddbmm(p, p @ p, p @ sigma_n, beta=1.5, alpha=-0.5)
    return p


def _identity(matrices: Tensor) -> Tensor:
    """I, (d, d), for matrices (..., d, d)."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
