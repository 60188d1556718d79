"""The channels of a network while it trains: a hook for MMEngine's runner."""
from typing import Dict

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor

from ..analysis.channels import INHIBITED, share_below
from ..analysis.collector import Collector, feature_map
from ..analysis.modules import ce_layers, select
from ..analysis.rectifiers import rectifiers

POSITIONS = 2048  # of a batch, enough for a correlation to within 0.02


@HOOKS.register_module()
class ChannelHealthHook(Hook):
    """Logs inhibited channels, their correlation and lambda of each stage of the backbone.

    In every `interval`-th iteration, on the main process, from the batch in training:
    `inhibited/layer3`, the share of channels whose mean absolute activation behind the
    rectifiers is below the threshold (section 2 of the paper); `correlation/layer3`, the mean
    absolute correlation between the channels behind a rectifier; `lambda/layer3`, of its CE
    layers. They go where the run's losses go: the JSON log, TensorBoard.

        custom_hooks = [dict(type='ChannelHealthHook', interval=200)]

    Networks without CE have no lambda. Nothing in training changes: rectifiers are watched,
    norms and CE are not.

    Args:
        interval: iterations from one measurement to the next.
        threshold: channels of a smaller magnitude are inhibited.
        alarm: warns once of a layer whose share of inhibited channels exceeds it.

    Raises:
        ValueError: for arguments out of their range; before training, if the backbone has no
            rectifier modules.
    """

    def __init__(self, interval: int = 200, threshold: float = INHIBITED,
                 alarm: float = 0.5) -> None:
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval!r}')
        if not threshold > 0:
            raise ValueError(f'threshold must be positive, got {threshold!r}')
        if not 0 <= alarm <= 1:
            raise ValueError(f'alarm must be a share, in [0, 1], got {alarm!r}')
        self.interval = interval
        self.threshold = threshold
        self.alarm = alarm
        self._warned = set()
        self._watching = None

    def before_train(self, runner) -> None:
        select(rectifiers(_backbone(runner)), None, 'rectifier module')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.every_n_train_iters(runner, self.interval) and is_main_process():
            self._watching = _Rectified(_backbone(runner)).__enter__()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self._watching is None:
            return
        self._watching.__exit__()
        layers, self._watching = self._watching.result(), None
        shares = {name: share_below(layer.magnitude, self.threshold)
                  for name, layer in layers.items()}
        self._warn(runner, shares)
        scalars = _by_stage('correlation', {n: x.correlation for n, x in layers.items()})
        scalars.update(_by_stage('inhibited', shares))
        scalars.update(_by_stage('lambda', {
            name: float(torch.as_tensor(ce.ratio()).detach())
            for name, ce in ce_layers(_backbone(runner)).items()}))
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _warn(self, runner, shares: Dict[str, float]) -> None:
        for name, share in shares.items():
            if share > self.alarm and name not in self._warned:
                self._warned.add(name)
                runner.logger.warning(
                    f'{100 * share:.0f} % of the channels behind {name} are inhibited: their mean '
                    f'absolute activation is below {self.threshold:g}')


class _Rectified(Collector):
    """Magnitude and correlation of the channels behind each rectifier, of one batch."""

    def __init__(self, model) -> None:
        super().__init__(model, rectifiers(model))

    def _new(self, name: str) -> '_Layer':
        return _Layer()

    def result(self) -> Dict[str, '_Layer']:
        return self._by_label()


class _Layer:

    def add(self, inputs, output) -> None:
        x = feature_map(output).flatten(2)  # (N, C, L)
        self.magnitude = x.abs().mean((0, 2), dtype=torch.float32)
        rows = x.movedim(1, -1).flatten(0, 1)  # (N * L, C)
        rows = rows[::max(len(rows) // POSITIONS, 1)].float()
        self.correlation = _mean_correlation(rows)


def _mean_correlation(rows: Tensor) -> float:
    """Mean absolute correlation of all pairs of different columns that vary; else 0."""
    centred = rows - rows.mean(0)
    deviation = centred.norm(dim=0)
    centred = centred[:, deviation > 0] / deviation[deviation > 0]
    channels = centred.shape[1]
    if channels < 2:
        return 0.
    correlation = (centred.mT @ centred).abs()
    return (correlation.sum() - correlation.trace()).item() / (channels * (channels - 1))


def _backbone(runner):
    """What is watched: the backbone, or the whole of a model without one."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return getattr(model, 'backbone', model)


def _by_stage(kind: str, values: Dict[str, float]) -> Dict[str, float]:
    """Means over the layers of each stage: {'inhibited/layer1': ...}."""
    stages = {}
    for name, value in values.items():
        stage = name.split('.')[0] if '.' in name else 'stem'
        stages.setdefault(f'{kind}/{stage}', []).append(value)
    return {stage: sum(found) / len(found) for stage, found in stages.items()}
