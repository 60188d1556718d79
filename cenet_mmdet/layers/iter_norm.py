"""The whitening normalizations that the CE paper compares with in its Table 3.

IterNorm: Huang, Zhou, Zhu, Liu, Shao, "Iterative Normalization: Beyond Standardization towards
Efficient Whitening", CVPR 2019 (arXiv 1904.03441). DBN: Huang, Yang, Lang, Deng, "Decorrelated
Batch Normalization", CVPR 2018 (arXiv 1804.08450).

Both take the place of a batch normalization layer, where CE follows one: they centre, and their
whitened features have unit variance. A forward pass has CE's steps.
"""
from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .arguments import check_eps_and_momentum, check_integers
from .steps.apply import apply_centred
from .steps.grouping import check_channels, fitting_group_size, grouped, ungrouped, without_autocast
from .steps.moments import BatchMoments, statistics_dtype, with_batch_moments
from .steps.running import read, track
from .steps.whitening import newton_whitening, trace

Device = Union[torch.device, str, None]


class _WhiteningNorm(nn.Module):
    """y = gamma * W (x - mean) + beta, where W whitens groups of channels; W is the subclass's.

    In evaluation, the mean and W are running averages, at first 0 and I. As in both papers, W is
    averaged and not the covariance.
    """
    _abbr_ = 'bn'  # MMCV names layers after this: bn1, as in checkpoints of plain ResNets

    identity: Tensor
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    running_mean: Tensor
    running_whitening: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, group_size: Optional[int], eps: float, momentum: float,
                 affine: bool, device: Device, dtype: Optional[torch.dtype]) -> None:
        super().__init__()
        check_integers(num_features=num_features)
        if group_size is not None:
            check_integers(group_size=group_size)
        check_eps_and_momentum(eps, momentum)

        self.num_features = num_features
        self.group_size = fitting_group_size(num_features, group_size)
        self.num_groups = num_features // self.group_size
        self.eps = eps
        self.momentum = momentum
        self.affine = affine

        factory: Dict[str, Any] = dict(device=device, dtype=dtype)
        shape = (self.num_groups, self.group_size, self.group_size)
        for name in ('weight', 'bias'):
            self.register_parameter(
                name, nn.Parameter(torch.empty(num_features, **factory)) if affine else None)
        identity = torch.empty(self.group_size, self.group_size, **factory)
        self.register_buffer('identity', identity, persistent=False)
        self.register_buffer('running_mean', torch.empty(num_features, **factory))
        self.register_buffer('running_whitening', torch.empty(shape, **factory))
        self.register_buffer('num_batches_tracked',
                             torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """mean = 0 and W = I."""
        self.running_mean.zero_()
        self.identity.copy_(torch.eye(self.group_size))
        self.running_whitening.copy_(self.identity)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """gamma = 1, beta = 0, statistics unset."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def whitening_matrix(self, covariance: Tensor) -> Tensor:
        """W of the covariance of each group: (G, d, d) -> (G, d, d)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.num_features)
        if self.training and x.numel() == self.num_features:
            raise ValueError(f'{type(self).__name__} needs more than one value per channel in '
                             f'training, got {tuple(x.shape)}; use a larger batch or eval()')
        # As in CE: no algebra in half precision, and the output keeps the input's type.
        with without_autocast(x):
            maps = grouped(x, self.num_groups)
            if self.training and x.numel() > 0:
                maps, batch = with_batch_moments(maps)
                mean, whitening = self._batch_statistics(batch)
            else:
                mean, whitening = self._running_statistics(maps)
            return ungrouped(self._normalize(maps, mean, whitening), like=x)

    def _batch_statistics(self, batch: BatchMoments) -> Tuple[Tensor, Tensor]:
        """Mean (G, d) and W (G, d, d) of this batch, which are tracked."""
        whitening = self.whitening_matrix(batch.covariance)
        track([(self.running_mean, batch.mean), (self.running_whitening, whitening)],
              self.momentum, self.num_batches_tracked,
              finite=whitening.sum() < float('inf'))
        return batch.mean, whitening

    def _running_statistics(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        dtype = statistics_dtype(x.dtype)
        mean = self.running_mean.view(self.num_groups, self.group_size)
        return read(mean, dtype), read(self.running_whitening, dtype)

    def _normalize(self, x: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
        """A x + b with A = diag(gamma) W and b = beta - A mean, for x (N, G, d, L)."""
        if not self.affine:
            return apply_centred(whitening, mean, torch.zeros_like(mean), x)
        gamma, beta = (p.to(mean.dtype).view_as(mean) for p in (self.weight, self.bias))
        return apply_centred(gamma.unsqueeze(-1) * whitening, mean, beta, x)

    def extra_repr(self) -> str:
        return (f'{self.num_features}, group_size={self.group_size}, eps={self.eps}, '
                f'momentum={self.momentum}, affine={self.affine}')


class IterNorm(_WhiteningNorm):
    """Iterative normalization (CVPR 2019): W by Newton's iteration, Algorithm 1 there.

    With sigma_N = sigma / trace(sigma), it is W = P_T / sqrt(trace(sigma)) of P_0 = I,
    P_k = (3 P_{k-1} - P_{k-1}^3 sigma_N) / 2. After T iterations, a direction with the share l of
    the trace has at most the variance 1.5^(2T) l: 5 whiten the directions of large variance and
    leave noise small. CE iterates 3 times and does not rescale.

    Args:
        num_features: number of channels C.
        group_size: channels d per whitening group; None for one group of all channels. A size that
            does not divide C is halved until it does, as CE's; ``repr`` shows the size in use.
        num_iters: Newton iterations T; more than about 10 amplify rounding.
        eps: added to the diagonal of the covariance.
        momentum: weight of the new value in the running averages.
        affine: whether there are a learned scale and shift of each channel.
        device, dtype: of the parameters and buffers.

    Shape:
        - Input: (N, C), (N, C, L) or (N, C, H, W), or more spatial dimensions.
        - Output: as the input. An empty input gives an empty output and leaves the statistics as
          they are, and so does a batch with inf or NaN, as in CE.

    Raises:
        ValueError: for an argument out of its range, input of another rank or number of channels,
            or one value per channel in training.
    """

    def __init__(self,
                 num_features: int,
                 group_size: Optional[int] = 64,
                 num_iters: int = 5,
                 eps: float = 1e-5,
                 momentum: float = 0.1,
                 affine: bool = True,
                 device: Device = None,
                 dtype: Optional[torch.dtype] = None) -> None:
        check_integers(num_iters=num_iters)
        super().__init__(num_features, group_size, eps, momentum, affine, device, dtype)
        self.num_iters = num_iters

    def whitening_matrix(self, covariance: Tensor) -> Tensor:
        """W = P_T / sqrt(trace(Sigma)), Sigma = covariance + eps I: (G, d, d) -> (G, d, d)."""
        p = newton_whitening(covariance, self.identity, self.eps, self.num_iters)
        return p * (trace(covariance) + self.eps * self.group_size).rsqrt()

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, num_iters={self.num_iters}'


class DBN(_WhiteningNorm):
    """Decorrelated batch normalization (CVPR 2018): ZCA whitening, W = sigma^(-1/2).

    Arguments, shapes and errors are those of IterNorm, without `num_iters`.
    """

    def __init__(self,
                 num_features: int,
                 group_size: Optional[int] = 16,
                 eps: float = 1e-5,
                 momentum: float = 0.1,
                 affine: bool = True,
                 device: Device = None,
                 dtype: Optional[torch.dtype] = None) -> None:
        super().__init__(num_features, group_size, eps, momentum, affine, device, dtype)

    def whitening_matrix(self, covariance: Tensor) -> Tensor:
        """W = D Lambda^(-1/2) D^T, D Lambda D^T = covariance + eps I: (G, d, d) -> (G, d, d)."""
        sigma = torch.add(covariance, self.identity.to(covariance.dtype), alpha=self.eps)
        # No eigenvalue of Sigma lies below eps, but rounding may move that of a dependent channel
        # there, or below 0.
        return inverse_root(sigma, smallest=self.eps)


def inverse_root(sigma: Tensor, smallest: float) -> Tensor:
    """sigma^(-1/2), differentiable any number of times, also at equal eigenvalues.

    Args:
        sigma: symmetric matrices, (..., d, d).
        smallest: eigenvalues below this positive number count as it.
    """
    return _InverseRoot.apply(sigma, smallest)[0]


class _InverseRoot(Function):
    """sigma (..., d, d) -> its inverse root Y, and the eigenpairs of its root R.

    The gradients through `eigh` contain 1 / (l_i - l_j), which is infinite at equal eigenvalues,
    such as those of channels that are already white. In Y these terms cancel: it depends on the
    spaces that the eigenvectors span. So its derivative is taken from R R = sigma.
    """

    @staticmethod
    def forward(sigma: Tensor, smallest: float) -> Tuple[Tensor, Tensor, Tensor]:
        finite = sigma.nan_to_num(0, 0, 0)  # eigh refuses anything else
        values, vectors = torch.linalg.eigh(finite)
        roots = values.clamp(min=smallest).sqrt()
        # Y = D Lambda^(-1/2) D^T, and NaN where sigma is
        return (vectors / roots.unsqueeze(-2)) @ vectors.mT + (sigma - finite), roots, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Tensor, None]:
        # Y = R^(-1), so dY = -Y dR Y, and dR R + R dR = dsigma. Both maps are self-adjoint:
        # Z = grad_sigma solves Z R + R Z = -Y grad Y.
        sigma, y, roots, vectors = ctx.saved_tensors
        return _Sylvester.apply(sigma @ y, -(y @ grad @ y), roots, vectors), None


class _Sylvester(Function):
    """Z of Z R + R Z = B, (..., d, d), for symmetric R with these eigenpairs.

    R itself is there for the second derivative, which avoids the eigenvectors too.
    """

    @staticmethod
    def forward(root: Tensor, b: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
        rotated = vectors.mT @ b @ vectors
        sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)  # sqrt(l_i) + sqrt(l_j), positive
        return vectors @ (rotated / sums) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: Any) -> None:
        root, _, roots, vectors = inputs
        ctx.save_for_backward(root, roots, vectors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, Tensor, None, None]:
        # dZ solves dZ R + R dZ = dB - Z dR - dR Z, and solving is self-adjoint.
        root, roots, vectors, z = ctx.saved_tensors
        grad_b = _Sylvester.apply(root, grad, roots, vectors)
        return -(z.mT @ grad_b + grad_b @ z.mT), grad_b, None, None
