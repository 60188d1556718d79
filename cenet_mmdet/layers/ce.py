"""Channel Equilibrium layer.

Paper: "Channel Equilibrium Networks for Learning Deep Representation", Shao, Tang, et al., ICML
2020 (arXiv 2003.00214). Section and equation numbers refer to it.

`CE.forward` reads as the method does, in the four steps that `steps/` has a file for each:
moments of the feature map -> of the batch -> a d x d operator per sample and group -> apply it.
`sync_ce.py` adds the other ranks to the second step, `fused.py` a batch norm in front, and
`reference.py` computes the same from the equations alone. The small algebra is float32 (float64
for float64 input), whatever the type of the feature map.
"""
from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .arguments import check_eps_and_momentum, check_integers
from .released_keys import rename_released_keys
from .steps.apply import apply_operator, apply_weights
from .steps.grouping import check_channels, fitting_group_size, grouped, ungrouped, without_autocast
from .steps.mix import mix
from .steps.moments import (
    BatchMoments,
    instance_moments,
    instance_variance,
    statistics_dtype,
    with_batch_moments,
)
from .steps.reweighting import InstanceReweighting, instance_scale
from .steps.running import read, track
from .steps.whitening import newton_whitening

FREEZE_MODES = ('none', 'adaptive', 'all')

# W (G, d, d) and s (scalar); None where a layer has no use for it
Statistics = Tuple[Optional[Tensor], Optional[Tensor]]


class CE(nn.Module):
    r"""Channel Equilibrium: put it after a normalization layer, before the ReLU.

    .. math:: p_n = [\lambda W + (1 - \lambda)\,\mathrm{diag}(w_n)]\, x_n

    W whitens groups of channels with the batch covariance (batch decorrelation, BD, section 3.1),
    w_n reweights the channels of one sample by their variances (instance reweighting, IR, section
    3.2), and lambda is the sigmoid of a learned scalar.

    In evaluation, W and the scale s of the weights are running averages. w_n still depends on the
    sample, and only on it.

    Args:
        in_channels: number of channels C.
        group_size: channels d per whitening group; None for one group of all channels, as in the
            paper's text. A size that does not divide C is halved until it does, as in the
            released code; ``repr`` shows the size in use.
        num_iters: Newton iterations T.
        eps: added to the diagonal of the covariance, and lower bound of the mean variance that s
            is the root of.
        momentum: weight of the new value in the running averages.
        reduction: the IR subnetwork's hidden width is C / reduction.
        bd_ratio: None to learn lambda, or its fixed value: 1.0 is BD alone and 0.0 is IR alone
            (Table 4). The branch that is not used is left out.
        freeze: 'none'; 'adaptive' freezes lambda and the IR subnetwork; 'all' freezes every
            parameter and uses the running statistics, whatever ``train()`` is called with.
        identity_start: compute x + t (CE(x) - x) with one more learned scalar t, `strength`, that
            starts at 0. A trained network then computes what it did when CE is put into it. Not
            in the paper.
        device, dtype: of the parameters and buffers.

    Shape:
        - Input: (N, C), (N, C, L) or (N, C, H, W), or more spatial dimensions.
        - Output: as the input. An empty input gives an empty output and leaves the statistics
          as they are.

    A sample of one pixel (H * W = 1) has no variance: v_n is 0, and s is the running one, also in
    training. A batch with inf or NaN goes wrong as in batch norm, but leaves the running averages
    as they were.

    Raises:
        ValueError: for an argument out of its range, or input of another rank or number of
            channels.
    """
    _version = 1
    _abbr_ = 'ce'  # MMCV names plugin layers after this: block.ce

    identity: Tensor
    running_mean: Tensor
    running_whitening: Tensor
    running_scale: Tensor
    num_batches_tracked: Tensor

    def __init__(self,
                 in_channels: int,
                 group_size: Optional[int] = 16,
                 num_iters: int = 3,
                 eps: float = 1e-5,
                 momentum: float = 0.1,
                 reduction: int = 4,
                 bd_ratio: Optional[float] = None,
                 freeze: str = 'none',
                 identity_start: bool = False,
                 device: Union[torch.device, str, None] = None,
                 dtype: Optional[torch.dtype] = None) -> None:
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
        self.identity_start = identity_start

        factory: Dict[str, Any] = dict(device=device, dtype=dtype)
        if self.has_bd:
            shape = (self.num_groups, self.group_size, self.group_size)
            identity = torch.empty(self.group_size, self.group_size, **factory)
            self.register_buffer('identity', identity, persistent=False)
            # Tracked and never used: the released checkpoints have it.
            self.register_buffer('running_mean', torch.empty(in_channels, **factory))
            self.register_buffer('running_whitening', torch.empty(shape, **factory))
        if self.has_ir:
            self.register_buffer('running_scale', torch.empty(1, **factory))
            self.reweighting = InstanceReweighting(in_channels, reduction, **factory)
        if bd_ratio is None:
            self.lambda_logit = nn.Parameter(torch.empty(1, **factory))
        if identity_start:
            self.strength = nn.Parameter(torch.empty(1, **factory))
        # 0 says that the statistics were neither trained nor loaded.
        self.register_buffer('num_batches_tracked',
                             torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()
        self.freeze_parameters()

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
            self.identity.copy_(torch.eye(self.group_size))
            self.running_whitening.copy_(self.identity)
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
        if self.identity_start:
            nn.init.zeros_(self.strength)

    def freeze_parameters(self) -> None:
        """Stop the learning of the parameters that `freeze` names."""
        for name, parameter in self.named_parameters():
            if self.freeze == 'all' or (self.freeze == 'adaptive' and name != 'strength'):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.in_channels)
        with without_autocast(x):
            maps = grouped(x, self.num_groups)  # (N, G, d, L)
            if self.takes_statistics_from(x):
                maps, samples = (with_batch_moments(maps) if self.has_bd
                                 else (maps, instance_moments(maps)))
                variance, batch = samples.variance, self.over_ranks(samples)
                whitening, scale = self.batch_statistics(batch)
                self.track(batch, whitening, scale)
            else:
                variance = instance_variance(maps) if self.has_ir else None
                whitening, scale = self.running_statistics(maps)
            if self.has_bd:
                out = apply_operator(self.operator(variance, whitening, scale), maps)
            else:
                weights = self.weights(variance, scale)
                out = apply_weights(self._from_identity(weights, torch.ones_like(weights)), maps)
            return ungrouped(out, like=x)

    def takes_statistics_from(self, x: Tensor) -> bool:
        """Whether W and s are those of this batch; an empty one has none."""
        return self.uses_batch_statistics and x.numel() > 0

    def over_ranks(self, batch: BatchMoments) -> BatchMoments:
        """Step 2: moments of the whole batch, which this process has."""
        return batch

    def batch_statistics(self, batch: BatchMoments) -> Statistics:
        """Step 3: W and s of the batch."""
        whitening = scale = None
        if self.has_bd:
            whitening = newton_whitening(batch.covariance, self.identity, self.eps, self.num_iters)
        if self.has_ir:
            scale = self._scale(batch)
        return whitening, scale

    def _scale(self, batch: BatchMoments) -> Tensor:
        """s of the batch, or the running one where no sample has a variance."""
        if isinstance(batch.samples, Tensor):  # over the ranks
            running = read(self.running_scale, batch.variance.dtype).squeeze(0)
            return torch.where(batch.samples > 0, instance_scale(batch.variance, self.eps), running)
        return (instance_scale(batch.variance, self.eps) if batch.samples
                else read(self.running_scale, batch.variance.dtype).squeeze(0))

    def track(self, batch: BatchMoments, whitening: Optional[Tensor],
              scale: Optional[Tensor]) -> Tensor:
        """Update the running averages, if the batch is finite; whether it is, a bool tensor."""
        averages = []
        if self.has_bd:
            averages += [(self.running_mean, batch.mean), (self.running_whitening, whitening)]
        if self.has_ir:
            averages += [(self.running_scale, scale)]
        # inf or NaN in a channel is NaN in W, whose entries are bounded otherwise
        finite = (whitening.sum() if self.has_bd else scale) < float('inf')
        if isinstance(batch.pixels, Tensor):
            finite = finite.logical_and(batch.pixels > 0)
        track(averages, self.momentum, self.num_batches_tracked, finite)
        return finite

    def running_statistics(self, maps: Tensor) -> Statistics:
        """The tracked W and s."""
        dtype = statistics_dtype(maps.dtype)
        return (read(self.running_whitening, dtype) if self.has_bd else None,
                read(self.running_scale, dtype) if self.has_ir else None)

    def operator(self, variance: Optional[Tensor], whitening: Tensor,
                 scale: Optional[Tensor]) -> Tensor:
        """Step 3: lambda W + (1 - lambda) diag(w_n), (N, G, d, d); without IR W, (G, d, d)."""
        operator = whitening
        if self.has_ir:
            weights = self.weights(variance, scale)
            operator = mix(self.ratio(weights.dtype), whitening, weights, self.identity)
        return self._from_identity(operator, self.identity)

    def weights(self, variance: Tensor, scale: Tensor) -> Tensor:
        """w_n = F(v_n) / s of eq. 8, (N, G, d)."""
        return self.reweighting(variance.flatten(1)).view(variance.shape) / scale

    def _from_identity(self, operator: Tensor, identity: Tensor) -> Tensor:
        """I + t (operator - I) with `identity_start`."""
        if not self.identity_start:
            return operator
        strength = self.strength.to(operator.dtype)
        return torch.lerp(identity.to(operator.dtype), operator, strength)

    def ratio(self, dtype: torch.dtype = torch.float32) -> Union[Tensor, float]:
        """lambda, the weight of BD against IR, in [0, 1]; a scalar tensor where it is learned."""
        if self.bd_ratio is None:
            return self.lambda_logit.to(dtype).sigmoid().squeeze(0)
        return self.bd_ratio

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        rename_released_keys(state_dict, prefix)
        if self.identity_start and f'{prefix}num_batches_tracked' in state_dict:
            # a layer without identity_start, which is at full strength
            state_dict.setdefault(f'{prefix}strength', torch.ones(1))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def arguments(self) -> Dict:
        """What `__init__` was given, with the group size in use."""
        names = ('in_channels', 'group_size', 'num_iters', 'eps', 'momentum', 'reduction',
                 'bd_ratio', 'freeze', 'identity_start')
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={value!r}' for name, value in self.arguments().items())
