"""Step 3 of a CE layer, batch decorrelation (BD): the whitening matrix of section 3.1."""
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function


def newton_whitening(covariance: Tensor, identity: Tensor, eps: float, num_iters: int) -> Tensor:
    """W by Newton's iteration for the inverse square root of Sigma / trace(Sigma), eq. 6.

        Sigma = covariance + eps I    S = Sigma / trace(Sigma)
        P_0 = I    P_{k+1} = 1.5 P_k - 0.5 P_k^3 S    W = P_T

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
    return _Newton.apply(sigma, identity, num_iters)[0]


def trace(matrices: Tensor) -> Tensor:
    """(G, d, d) -> (G, 1, 1)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


class _Newton(Function):
    """Sigma (G, d, d) -> W; with its derivative, which takes half of autograd's operations."""
    generate_vmap_rule = True

    @staticmethod
    def forward(sigma: Tensor, identity: Tensor, num_iters: int) -> Tuple[Tensor, ...]:
        return _newton(sigma, identity, num_iters)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: Any) -> None:
        sigma, identity, ctx.num_iters = inputs
        ctx.set_materialize_grads(False)  # of what is there for the backward pass alone
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(sigma, identity, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], None, None]:
        if grad is None:
            return None, None, None
        # Of P' = 1.5 P - 0.5 A B with A = P P and B = P S, all of them symmetric:
        # grad_P = 1.5 grad - 0.5 (grad B P + P grad B + A grad S), grad_S = -0.5 P A grad
        sigma, identity, size, s, *steps = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            size, s, *steps = _newton(sigma, identity, ctx.num_iters)[1:]
        grad_s = torch.zeros_like(s)
        for i in reversed(range(0, len(steps), 3)):
            p, a, b = steps[i:i + 3]
            grad_b, grad_a = a @ grad, grad @ b
            grad_s = torch.baddbmm(grad_s, p, grad_b, alpha=-0.5)
            grad = torch.baddbmm(grad, grad_a, p, beta=1.5, alpha=-0.5)
            grad = torch.baddbmm(grad, p, grad_a, alpha=-0.5)
            grad = torch.baddbmm(grad, grad_b, s, alpha=-0.5)
        grad_s = torch.sub(grad_s, grad, alpha=0.5)  # of P_1
        # S = Sigma / trace(Sigma)
        inner = (grad_s * s).sum((-2, -1), keepdim=True)
        return torch.addcmul(grad_s, inner, identity, value=-1) / size, None, None


def _newton(sigma: Tensor, identity: Tensor, num_iters: int) -> Tuple[Tensor, ...]:
    """W, trace(Sigma), S, and P, A = P P and B = P S of each step."""
    size = trace(sigma)
    s = sigma / size
    p = torch.lerp(s, identity, 1.5)  # P_1 = 1.5 I - 0.5 S needs no product
    steps: List[Tensor] = []
    for _ in range(num_iters - 1):
        a, b = p @ p, p @ s
        steps += [p, a, b]
        p = torch.baddbmm(p, a, b, beta=1.5, alpha=-0.5)
    return (p, size, s, *steps)
