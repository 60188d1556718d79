"""Step 3 of a CE layer, batch decorrelation (BD): the whitening matrix of section 3.1."""
import torch
from torch import Tensor


def trace(matrices: Tensor) -> Tensor:
    """(G, d, d) -> (G, 1, 1)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def newton_whitening(covariance: Tensor, identity: Tensor, eps: float, num_iters: int) -> Tensor:
    """W by Newton's iteration for the inverse square root of Sigma / trace(Sigma), eq. 6.

        Sigma = covariance + eps I    Sigma_N = Sigma / trace(Sigma)
        P_0 = I    P_{k+1} = 1.5 P_k - 0.5 P_k^3 Sigma_N    W = P_T

    Like the paper, and unlike IterNorm, this does not multiply by trace(Sigma)^(-1/2) afterwards.
    The gain is at most 1.5^T, so T = 3 is far from an inverse root, by design. Beyond T of about
    10 the iteration amplifies its own rounding.

    Args:
        covariance: (G, d, d), biased.
        identity: I, (d, d).
        eps: added to the diagonal of the covariance.
        num_iters: number of iterations T, at least 1.

    Returns:
        (G, d, d).
    """
    identity = identity.to(covariance.dtype)
    sigma = torch.add(covariance, identity, alpha=eps)
    sigma_n = sigma / trace(sigma)
    p = torch.lerp(sigma_n, identity, 1.5)  # P_1 = 1.5 I - 0.5 Sigma_N needs no product
    for _ in range(num_iters - 1):
        p = torch.baddbmm(p, p @ p, p @ sigma_n, beta=1.5, alpha=-0.5)
    return p

