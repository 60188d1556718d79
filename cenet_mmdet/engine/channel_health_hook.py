"""The channels of a network while it trains: a hook for MMEngine's runner."""
import math
from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ..analysis.channels import INHIBITED, share_below
from ..analysis.collector import Collector, first_non_finite, is_finite, pixels
from ..analysis.correlation import mean_correlation
from ..analysis.modules import rectifiers, select, stage
from ..analysis.parameters import lambdas
from ..utils.errors import InputError

POSITIONS = 2048  # of a batch, enough for a correlation to within 0.02


@HOOKS.register_module()
class ChannelHealthHook(Hook):
    """Logs inhibited channels, their correlation and lambda of each stage of the backbone.

        custom_hooks = [dict(type='ChannelHealthHook', interval=200)]

    It measures batches in training, on the main process. `inhibited/layer3` is the share of
    channels whose mean |activation| behind the rectifiers is below the threshold (section 2),
    `correlation/layer3` their mean |correlation|, `lambda/layer3` that of CE. A network without
    stages is logged by layer: `inhibited/features.3`. A warning names where NaN or inf begin.

    Args:
        interval: iterations from one measurement to the next.
        threshold: channels of a smaller magnitude are inhibited.
        alarm: warn once about each layer whose share of inhibited channels exceeds it.

    Raises:
        InputError: an argument is out of range; before training, if the backbone has no rectifier.
    """

    def __init__(self, interval: int = 200, threshold: float = INHIBITED,
                 alarm: float = 0.5) -> None:
        if not (interval >= 1 and threshold > 0 and 0 <= alarm <= 1):
            raise InputError('interval must be at least 1, threshold positive, alarm in [0, 1]; '
                             f'got {interval!r}, {threshold!r} and {alarm!r}')
        self.interval = interval
        self.threshold = threshold
        self.alarm = alarm
        self._warned: Set[Optional[str]] = set()
        self._watching: Optional[ExitStack] = None

    def before_train(self, runner: Any) -> None:
        select(rectifiers(_backbone(runner)), None, 'rectifier module')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self.every_n_train_iters(runner, self.interval) and is_main_process():
            self._watching, backbone = ExitStack(), _backbone(runner)
            self._rectified = self._watching.enter_context(
                Collector(backbone, rectifiers(backbone), measure_rectified))
            self._non_finite = self._watching.enter_context(first_non_finite(_model(runner)))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        if self._watching is None:
            return
        self._watching.close()
        self._watching = None
        iteration, measured = runner.iter + 1, self._rectified.statistics()
        if not is_finite([outputs, [magnitude for magnitude, _ in measured.values()]]):
            where = self._non_finite or ['the loss; the outputs of all modules are finite, so '
                                         'check the targets']
            self._warn(runner, None, f'values are not finite in iteration {iteration}: {where[0]}')
            return
        shares = {name: share_below(x, self.threshold) for name, (x, _) in measured.items()}
        for name, share in shares.items():
            if share > self.alarm:
                self._warn(runner, name, f'{100 * share:.0f} % of the channels behind {name} are '
                           f'inhibited: their mean absolute activation is below {self.threshold:g}')
        scalars = _by_stage(inhibited=shares, correlation={n: x for n, (_, x) in measured.items()},
                            **{'lambda': lambdas(_backbone(runner))})
        runner.visualizer.add_scalars(scalars, step=iteration)

    def _warn(self, runner: Any, subject: Optional[str], message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            runner.logger.warning(message)


def measure_rectified(rectifier: nn.Module, inputs: Any, output: Tensor,
                      before: Any) -> Tuple[Tensor, float]:
    """Mean |activation| (C,), and mean |correlation|, of the channels in one batch."""
    rows = pixels(output)
    some = rows[::max(len(rows) // POSITIONS, 1)].float()
    covariance = torch.cov(some.mT, correction=0).view(rows.shape[1], -1)
    correlation = mean_correlation(covariance, some.mean(0).abs(), torch.finfo(rows.dtype).eps)
    return rows.abs().mean(0, dtype=torch.float32), correlation.mean


def _model(runner: Any) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _backbone(runner: Any) -> nn.Module:
    # or the whole of a model without one
    return getattr(_model(runner), 'backbone', _model(runner))


def _by_stage(**measured: Dict[str, float]) -> Dict[str, float]:
    """Means over the layers of each stage, {'inhibited/layer1': ...}; a NaN does not count."""
    stages: Dict[str, List[float]] = {}
    for kind, values in measured.items():
        for name, value in values.items():
            if not math.isnan(value):
                stages.setdefault(f'{kind}/{stage(name)}', []).append(value)
    return {key: sum(found) / len(found) for key, found in stages.items()}
