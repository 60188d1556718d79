"""Channel Equilibrium layer.

Paper: "Channel Equilibrium Networks for Learning Deep Representation",
Shao, Tang, et al., ICML 2020. Section and equation numbers refer to it.

A forward pass is moments (`moments.py`) -> operator (`whitening.py`,
`reweighting.py`, `operator.py`) -> apply (`apply.py`); `sync_ce.py` puts an
all-reduce of the moments behind the first, and `batch_norm.py` computes a batch
norm in front along with both ends. Only the first and the last touch the
feature map, each with one batched product; what lies between is d x d algebra
in float32 (float64 for float64 input).
"""
from typing import Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .apply import apply_operator, apply_weights
from .batch_norm import Affine, affine_of, synchronizes
from .checks import check_eps_and_momentum, check_integers
from .grouping import grouped, ungrouped
from .moments import BatchMoments, instance_variance, moments, pool, statistics_dtype, track
from .nonfinite import tell_of_left_out
from .operator import mix
from .released import rename_released_keys
from .reweighting import InstanceReweighting, instance_scale
from .whitening import covariance, newton_whitening

FREEZE_MODES = ('none', 'adaptive', 'all')

# W, v_n and s; None where a layer has no use for it
Statistics = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]


class CE(nn.Module):
    r"""Channel Equilibrium: put it after a normalization layer, before the ReLU.

    .. math:: p_n = [\lambda W + (1 - \lambda)\,\mathrm{diag}(w_n)]\, x_n

    W whitens groups of channels with the batch covariance (batch
    decorrelation, BD, section 3.1), w_n reweights the channels of one sample
    by their variances (instance reweighting, IR, section 3.2), and lambda is
    the sigmoid of a learned scalar.

    In evaluation, W and the scale s of the weights are running averages;
    w_n still depends on the sample, and only on it.

    Args:
        in_channels: number of channels C.
        group_size: channels d per whitening group; None for one group of all
            channels, as in the paper's text. A size that does not divide C is
            halved until it does, as in the released code; ``repr`` shows the
            size in use.
        num_iters: Newton iterations T.
        eps: added to the diagonal of the covariance, and lower bound of the
            mean variance that s is the root of.
        momentum: weight of the new value in the running averages.
        reduction: the IR subnetwork's hidden width is C / reduction.
        bd_ratio: None to learn lambda, or its fixed value: 1.0 is BD alone and
            0.0 IR alone (Table 4); the unused branch is then left out.
        freeze: 'none'; 'adaptive' freezes lambda and the IR subnetwork; 'all'
            also uses the running statistics, whatever ``train()`` is called.
        device, dtype: of the parameters and buffers.

    Shape:
        - Input: (N, C), (N, C, L) or (N, C, H, W), or more spatial dimensions.
        - Output: as the input. An empty input gives an empty output and
          leaves the statistics as they are.

    Where a sample has one pixel (H * W = 1) it has no variance: v_n is 0 and
    s is the running one, also in training. A sample with inf or NaN has no part
    in the statistics and does not change the output of the others; a warning
    names the layer, once for each network.

    Raises:
        ValueError: for an argument out of its range, or input of another
            rank or number of channels.
    """
    _version = 1
    _abbr_ = 'ce'  # MMCV names plugin layers after this: block.ce

    def __init__(self,
                 in_channels: int,
                 group_size: Optional[int] = 16,
                 num_iters: int = 3,
                 eps: float = 1e-5,
                 momentum: float = 0.1,
                 reduction: int = 4,
                 bd_ratio: Optional[float] = None,
                 freeze: str = 'none',
                 device=None,
                 dtype=None) -> None:
        super().__init__()
        check_integers(in_channels=in_channels, num_iters=num_iters, reduction=reduction)
        if group_size is not None:
            check_integers(group_size=group_size)
        check_eps_and_momentum(eps, momentum)
        if bd_ratio is not None and not 0 <= bd_ratio <= 1:
            raise ValueError(f'bd_ratio must be None (learned) or lie in [0, 1], got {bd_ratio!r}')
        if freeze not in FREEZE_MODES:
            raise ValueError(f'freeze must be one of {FREEZE_MODES}, got {freeze!r}')

        self.in_channels = in_channels
        self.group_size = fitting_group_size(in_channels, group_size)
        self.num_groups = in_channels // self.group_size
        self.num_iters = num_iters
        self.eps = eps
        self.momentum = momentum
        self.reduction = reduction
        self.bd_ratio = bd_ratio
        self.freeze = freeze

        factory = dict(device=device, dtype=dtype)
        if self.has_bd:
            shape = (self.num_groups, self.group_size, self.group_size)
            self.register_buffer('running_mean', torch.empty(in_channels, **factory))
            self.register_buffer('running_whitening', torch.empty(shape, **factory))
        if self.has_ir:
            self.register_buffer('running_scale', torch.empty(1, **factory))
            self.reweighting = InstanceReweighting(in_channels, reduction, **factory)
        if bd_ratio is None:
            self.lambda_logit = nn.Parameter(torch.empty(1, **factory))
        # 0 says that the statistics were neither trained nor loaded.
        self.register_buffer('num_batches_tracked',
                             torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()
        if freeze != 'none':
            self.requires_grad_(False)

    @property
    def has_bd(self) -> bool:
        """Whether there is a batch decorrelation branch."""
        return self.bd_ratio != 0

    @property
    def has_ir(self) -> bool:
        """Whether there is an instance reweighting branch."""
        return self.bd_ratio != 1

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the next forward takes W and s from its batch and tracks them."""
        return self.training and self.freeze != 'all'

    def reset_running_stats(self) -> None:
        """W = I and s = 1: until the first batch, CE neither mixes nor rescales."""
        if self.has_bd:
            self.running_mean.zero_()
            self.running_whitening.copy_(torch.eye(self.group_size))
        if self.has_ir:
            self.running_scale.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """lambda = 0.5, framework default for the IR subnetwork, statistics unset."""
        self.reset_running_stats()
        if self.has_ir:
            self.reweighting.reset_parameters()
        if self.bd_ratio is None:
            nn.init.zeros_(self.lambda_logit)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def forward_behind(self, norm: nn.Module, z: Tensor) -> Tensor:
        """What `self(norm(z))` is, where `batch_norm.can_fuse` says that it can be had in one."""
        return self._forward(z, norm)

    def _forward(self, x: Tensor, norm: Optional[nn.Module] = None) -> Tensor:
        """Of x, or of norm(x): see `batch_norm.py` for the latter."""
        if x.dim() < 2 or x.shape[1] != self.in_channels:
            raise ValueError(f'CE expects (N, {self.in_channels}), (N, {self.in_channels}, L) or '
                             f'(N, {self.in_channels}, H, W), got {tuple(x.shape)}')
        # The operator's algebra must not run in half precision, and the output
        # keeps the input's type.
        with torch.autocast(x.device.type, enabled=False):
            maps = grouped(x, self.num_groups)
            if self._takes_statistics_from(maps):
                maps, statistics, affine = self._batch_statistics(maps, norm)
            else:
                statistics, affine = self._running_statistics(maps, norm)
            return ungrouped(self._equilibrate(maps, *statistics, affine), like=x)

    def _takes_statistics_from(self, x: Tensor) -> bool:
        """Whether to use the statistics of this batch; an empty one has none."""
        return self.uses_batch_statistics and x.numel() > 0

    def _batch_statistics(self, x: Tensor, norm) -> Tuple[Tensor, Statistics, Optional[Affine]]:
        """x (see `moments`); W, v_n and s, of which W and s are tracked; the norm, if there."""
        per_sample = variance = affine = None
        if self.has_bd:
            per_sample, x = moments(x)
        if self.has_ir:
            variance = per_sample.variance() if self.has_bd else instance_variance(x)
        batch = pool(per_sample, variance, pixels=x.shape[-1])
        tell_of_left_out(self, len(x) * x.shape[-1] - batch.pixels)
        if norm is None or synchronizes(norm):
            batch = self._over_ranks(batch)
        if norm is not None:
            affine = affine_of(norm, x.shape[1:3], batch.mean.dtype, batch)
            batch = affine.moments(batch)
            if not synchronizes(norm):
                batch = self._over_ranks(batch)
            if self.has_ir:
                variance = affine.variance(variance)
        whitening = scale = None
        if self.has_bd:
            whitening = newton_whitening(covariance(batch, self.eps), self.num_iters)
        if self.has_ir:
            scale = self._scale(batch)
        self._track(batch, whitening, scale)
        return x, (whitening, variance, scale), affine

    def _over_ranks(self, batch: BatchMoments) -> BatchMoments:
        """Step 2; here the batch is this process's own."""
        return batch

    def _scale(self, batch: BatchMoments) -> Tensor:
        """s of the batch, or the running one where no sample has a variance."""
        running = self._read(self.running_scale, batch.variance).squeeze(0)
        return torch.where(batch.samples > 0, instance_scale(batch.variance, self.eps), running)

    def _running_statistics(self, x: Tensor, norm) -> Tuple[Statistics, Optional[Affine]]:
        """The tracked W and s, and v_n, which is the sample's own; the norm, if there is one."""
        affine = None
        if norm is not None:
            affine = affine_of(norm, x.shape[1:3], statistics_dtype(x.dtype), None)
        whitening = self._read(self.running_whitening, x) if self.has_bd else None
        if not self.has_ir:
            return (whitening, None, None), affine
        variance = instance_variance(x)
        if affine is not None:
            variance = affine.variance(variance)
        return (whitening, variance, self._read(self.running_scale, x)), affine

    @staticmethod
    def _read(buffer: Tensor, x: Tensor) -> Tensor:
        # A copy: the backward pass needs these values, and another forward of
        # the same layer may update the buffer in place before it comes.
        return buffer.to(statistics_dtype(x.dtype), copy=True)

    @torch.no_grad()
    def _track(self, batch: BatchMoments, whitening, scale) -> None:
        """Update the running averages and count the batch, unless it was empty."""
        if self.has_bd:
            track(self.running_mean, batch.mean, self.momentum, batch.pixels)
            track(self.running_whitening, whitening, self.momentum, batch.pixels)
        if self.has_ir:
            track(self.running_scale, scale, self.momentum, batch.pixels)
        self.num_batches_tracked.add_(batch.pixels > 0)

    def _equilibrate(self, x: Tensor, whitening, variance, scale, affine) -> Tensor:
        """p_n of the class docstring, for the feature map x (N, G, d, L) or affine's of it."""
        if not self.has_ir:
            return apply_operator(whitening, x, affine)
        gates = self.reweighting(variance.reshape(len(x), self.in_channels))
        weights = gates.reshape(variance.shape) / scale  # w_n = F(v_n) / s, eq. 8
        if not self.has_bd:
            return apply_weights(weights, x)
        return apply_operator(mix(self.ratio(weights.dtype), whitening, weights), x, affine)

    def ratio(self, dtype: torch.dtype = torch.float32) -> Union[Tensor, float]:
        """lambda, the weight of BD against IR, in [0, 1]; a scalar tensor where it is learned."""
        if self.bd_ratio is None:
            return self.lambda_logit.to(dtype).sigmoid().squeeze(0)
        return self.bd_ratio

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        rename_released_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        ratio = 'learned' if self.bd_ratio is None else self.bd_ratio
        return (f'{self.in_channels}, group_size={self.group_size}, num_iters={self.num_iters}, '
                f'eps={self.eps}, momentum={self.momentum}, reduction={self.reduction}, '
                f'bd_ratio={ratio}, freeze={self.freeze!r}')


def fitting_group_size(channels: int, group_size: Optional[int]) -> int:
    """The largest of group_size, group_size / 2, ... that divides `channels`."""
    if group_size is None:
        return channels
    while channels % group_size:
        group_size //= 2
    return group_size
