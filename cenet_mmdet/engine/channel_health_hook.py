"""The channels of a network while it trains: a hook for MMEngine's runner."""
import math
from contextlib import ExitStack
from typing import Dict

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from ..analysis.channels import INHIBITED, check_threshold, share_below
from ..analysis.collector import Collector, feature_map
from ..analysis.correlation import mean_correlation
from ..analysis.learned_operators import lambdas
from ..analysis.modules import rectifiers, select, stage
from ..analysis.nonfinite import FirstNonFinite, is_finite
from ..analysis.running_moments import pixels
from ..utils.errors import InputError

POSITIONS = 2048  # of a batch, enough for a correlation to within 0.02


@HOOKS.register_module()
class ChannelHealthHook(Hook):
    """Logs inhibited channels, their correlation and lambda of each stage of the backbone.

    In every `interval`-th iteration, on the main process, from the batch in training:
    `inhibited/layer3`, the share of channels whose mean |activation| behind the rectifiers is
    below the threshold (section 2); `correlation/layer3`, the mean |correlation| between the
    channels behind a rectifier; `lambda/layer3`, of the CE layers. In a network without stages,
    such as a VGG, they go by layer: `inhibited/features.3`. They are logged with the losses.

        custom_hooks = [dict(type='ChannelHealthHook', interval=200)]

    If a rectifier's output or the loss is not finite in such an iteration, one warning names the
    first module of the model whose output is not finite. Nothing in training changes: norms and
    CE get no hooks, which would keep them from being computed in one.

    Args:
        interval: iterations from one measurement to the next.
        threshold: channels of a smaller magnitude are inhibited.
        alarm: warn once about each layer whose share of inhibited channels exceeds it.

    Raises:
        InputError: an argument is out of its range; before training, the backbone has no rectifier.
    """

    def __init__(self, interval: int = 200, threshold: float = INHIBITED,
                 alarm: float = 0.5) -> None:
        if interval < 1:
            raise InputError(f'interval must be at least 1, got {interval!r}')
        if not 0 <= alarm <= 1:
            raise InputError(f'alarm must be a share, in [0, 1], got {alarm!r}')
        self.interval = interval
        self.threshold = check_threshold(threshold)
        self.alarm = alarm
        self._warned = set()
        self._watching = None

    def before_train(self, runner) -> None:
        select(rectifiers(_backbone(runner)), None, 'rectifier module')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.every_n_train_iters(runner, self.interval) and is_main_process():
            self._watching = ExitStack()
            backbone = _backbone(runner)
            self._rectified = self._watching.enter_context(
                Collector(backbone, rectifiers(backbone), lambda rectifier: _Rectified()))
            self._non_finite = self._watching.enter_context(FirstNonFinite(_model(runner)))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self._watching is None:
            return
        self._watching.close()
        self._watching = None
        layers = self._rectified.statistics()
        if not is_finite([outputs, [layer.magnitude for layer in layers.values()]]):
            self._warn_not_finite(runner)
            return
        shares = {name: share_below(layer.magnitude, self.threshold)
                  for name, layer in layers.items()}
        self._warn_inhibited(runner, shares)
        scalars = _by_stage('inhibited', shares)
        scalars.update(_by_stage('correlation', {n: x.correlation for n, x in layers.items()}))
        scalars.update(_by_stage('lambda', lambdas(_backbone(runner))))
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _warn_inhibited(self, runner, shares: Dict[str, float]) -> None:
        for name, share in shares.items():
            if share > self.alarm and name not in self._warned:
                self._warned.add(name)
                runner.logger.warning(
                    f'{100 * share:.0f} % of the channels behind {name} are inhibited: their mean '
                    f'absolute activation is below {self.threshold:g}')

    def _warn_not_finite(self, runner) -> None:
        if FirstNonFinite in self._warned:
            return
        self._warned.add(FirstNonFinite)
        found = self._non_finite
        where = 'the loss; the outputs of all modules are finite, so check the targets'
        if found.name:
            advice = ('its input is finite, so check its weights' if found.input_is_finite else
                      'its input has them too, so check the images and what comes before it')
            where = f'{found.name} is the first module with inf or NaN in its output, and {advice}'
        runner.logger.warning(f'values are not finite in iteration {runner.iter + 1}: {where}')


class _Rectified:
    """Magnitude and correlation of the channels behind a rectifier, of one batch."""

    def add(self, inputs, output) -> None:
        rows = pixels(feature_map(output))
        self.magnitude = rows.abs().mean(0, dtype=torch.float32)
        rounding = torch.finfo(rows.dtype).eps
        rows = rows[::max(len(rows) // POSITIONS, 1)].float()
        covariance = torch.cov(rows.mT, correction=0).view(rows.shape[1], -1)
        self.correlation = mean_correlation(covariance, rows.mean(0).abs(), rounding).mean


def _model(runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _backbone(runner) -> nn.Module:
    """What is measured: the backbone, or the whole of a model without one."""
    return getattr(_model(runner), 'backbone', _model(runner))


def _by_stage(kind: str, values: Dict[str, float]) -> Dict[str, float]:
    """Means over the layers of each stage, {'inhibited/layer1': ...}; a NaN does not count."""
    stages = {}
    for name, value in values.items():
        if not math.isnan(value):
            stages.setdefault(f'{kind}/{stage(name)}', []).append(value)
    return {key: sum(found) / len(found) for key, found in stages.items()}
