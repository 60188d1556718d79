"""Figures of a channel report and of training logs; each returns whether it had data to draw."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from ..utils.errors import InputError
from .modules import stage
from .report import Report, Series

# The output of BD alone equals that of the layer, and shows through the dashes.
STYLES = {'output': dict(color='black', linestyle='--')}
# The first of them that an evaluator returns is drawn: mask AP, box AP, accuracy, or any metric.
MAIN_METRICS = 'segm_mAP', 'bbox_mAP', 'mAP', 'top1', ''
Curves = Dict[str, Dict[str, List[Tuple[int, float]]]]  # (iteration, value) by kind and stage


def inhibited(report: Report, path: Path) -> bool:
    """Share of inhibited channels by depth, and in total (Figures 1 and 4d)."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout='constrained')
    _by_depth(axes, {f'{name} ({model.inhibited_total:.1%} in total)': model.inhibited
                     for name, model in report.models.items()})
    axes.set(ylabel='share of channels', ylim=(0, None),
             title=f'channels with a mean |activation| below {report.threshold:g}')
    return _save(figure, path)


def gammas(report: Report, path: Path) -> bool:
    """Small gamma and small effective gamma by depth (left), and Proposition 1 (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    small, effective = report.series('small_gamma'), report.series('small_effective_gamma')
    _by_depth(left, small)
    _by_depth(left, {f'{name}, effective': {norm: effective[name].get(norm) for norm in layers}
                     for name, layers in small.items()}, linestyle=':', marker='x')
    _by_depth(right, report.series('gamma_growth'))
    if left.lines:
        right.axhline(1, color='grey', linewidth=0.8)
    left.set(ylabel='share of channels', ylim=(0, None),
             title=f'channels with |gamma| below {report.threshold:g}')
    right.set(ylabel='norm of gamma_hat / norm of gamma', title='Proposition 1, measured')
    return _save(figure, path)


def correlations(report: Report, path: Path) -> bool:
    """Mean absolute correlation between channels by depth (Figure 5), a panel for each model."""
    figure, panels = plt.subplots(1, len(report.models), sharey=True, squeeze=False,
                                  figsize=(5.5 * len(report.models), 3.8), layout='constrained')
    for axes, (name, points) in zip(panels[0], report.series('correlation').items()):
        _by_depth(axes, points)
        axes.set_title(name)
    panels[0][0].set(ylabel='mean |correlation|', ylim=(0, None))  # shared by all
    return _save(figure, path)


def operators(report: Report, path: Path) -> bool:
    """lambda, spectrum of W and spread of IR's weights of each CE layer, by depth."""
    figure, (ratio, spectrum, spread) = plt.subplots(1, 3, figsize=(14, 3.8), layout='constrained')
    _by_depth(ratio, report.series('bd_ratio'))
    for end in (min, max):
        _by_depth(spectrum, {name: {layer: end(values) for layer, values in layers.items()}
                             for name, layers in report.series('eigenvalues').items()})
    _by_depth(spread, report.series('weights_spread'))
    ratio.set(title='lambda: 1 is BD, 0 is IR', ylim=(0, 1))
    spectrum.set(title='smallest and largest eigenvalue of W')
    spread.set(title='IR weights: deviation over images / mean', ylim=(0, None))
    return _save(figure, path)


def ablation(report: Report, path: Path) -> bool:
    """The main metric by the share of zeroed channels, with the range of the seeds (Figure 4c)."""
    figure, axes = plt.subplots(figsize=(6, 3.8), layout='constrained')
    for name, measured in report.series('ablation').items():
        if measured:
            metric = next(m for end in MAIN_METRICS for m in measured['curves'] if m.endswith(end))
            curves = np.array(measured['curves'][metric])
            line, = axes.plot(measured['fractions'], curves.mean(0), marker='.', label=name)
            axes.fill_between(measured['fractions'], curves.min(0), curves.max(0), alpha=.25,
                              color=line.get_color())
            axes.set(xlabel='share of channels zeroed', ylabel=metric, ylim=(0, None))
    return _save(figure, path)


def magnitudes(images: Sequence, maps: Mapping[str, Sequence], path: Path) -> bool:
    """The images, and below them the l2 norm over a layer's channels, by model (Figure 3).

    `images` are arrays (C, H, W) of any range: three channels are BGR, others are averaged. `maps`
    are arrays (h, w) for each image, by the label of their row.
    """
    rows, columns, (height, width) = 1 + len(maps), len(images), images[0].shape[1:]
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout='constrained',
                                  figsize=(2.6 * columns + 1, 2.7 * rows * height / width))
    for axes, image in zip(panels[0], images):
        picture = image[::-1].transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
        axes.imshow((picture - picture.min()) / (np.ptp(picture) or 1), cmap='gray')
    top = max(np.max(of_model) for of_model in maps.values())
    for row, (label, of_model) in zip(panels[1:], maps.items()):
        for axes, values in zip(row, of_model):
            shown = axes.imshow(values, vmin=0, vmax=top)
        row[0].set_ylabel(label)
    figure.colorbar(shown, ax=panels.ravel().tolist(), shrink=.5)
    plt.setp(panels.ravel(), xticks=[], yticks=[])
    return _save(figure, path)


def read_curves(run: Path) -> Curves:
    """What `ChannelHealthHook` logged in a run, from its work dir; an InputError if nothing."""
    records: List[Dict] = []
    for log in sorted([*run.glob('vis_data/scalars.json'), *run.glob('*/vis_data/scalars.json')]):
        # A run that goes on may be writing the last line.
        lines = log.read_text().rpartition('\n')[0].splitlines()
        new = [json.loads(line) for line in lines if '"inhibited/' in line]
        # A resumed run repeats the iterations after its last checkpoint.
        records = [old for old in records if not new or old['step'] < new[0]['step']] + new
    if not records:
        raise InputError(f'{run} has no measurements of channels in */vis_data/scalars.json; give '
                         "the work dir of a run with custom_hooks=[dict(type='ChannelHealthHook')]")
    curves: Curves = {'inhibited': {}, 'correlation': {}, 'lambda': {}}
    for record in records:
        for key, value in record.items():
            kind, _, label = key.partition('/')
            if kind in curves:
                curves[kind].setdefault(label, []).append((record['step'], value))
    return curves


def training(runs: Mapping[str, Curves], path: Path) -> bool:
    """Inhibited share, correlation and lambda by stage over the iterations, a row for each run."""
    figure, panels = plt.subplots(len(runs), 3, figsize=(14, 3.4 * len(runs)), sharey='col',
                                  squeeze=False, layout='constrained')
    for row, (name, curves) in zip(panels, runs.items()):
        stages = list(dict.fromkeys(label for by_stage in curves.values() for label in by_stage))
        lines = {}
        for axes, (kind, by_stage) in zip(row, curves.items()):
            axes.set(title=f'{name}: {kind}' if by_stage else '', xlabel='iteration')
            axes.axis('on' if by_stage else 'off')
            for label, points in by_stage.items():
                color = plt.get_cmap('viridis')(stages.index(label) / len(stages))
                lines[label], = axes.plot(*zip(*points), color=color, marker='.')
        row[-1].legend(list(lines.values()), list(lines), frameon=False, fontsize='small',
                       loc='center left', bbox_to_anchor=(1, 0.5))
    for axes, label in zip(panels[0], ('share of channels', 'mean |correlation|', 'lambda')):
        axes.set(ylabel=label, ylim=(0, 1 if label == 'lambda' else None))
    return _save(figure, path)


def _by_depth(axes: Any, series: Mapping[str, Series], **style: Any) -> None:
    """A line for each series over its layers, from depth 0 to 1, labelled with the stages."""
    for index, (label, layers) in enumerate(series.items()):
        known = [point for point in zip(np.linspace(0, 1, len(layers)), layers.values())
                 if point[1] is not None]
        if known:
            axes.plot(*zip(*known), label=label, **{'color': f'C{index}', 'marker': '.', **style,
                                                    **STYLES.get(label, {})})
    axes.set_xlabel('depth in the network')
    stages = [[stage(layer) for layer in layers] for layers in series.values() if layers]
    if stages and all(others == stages[0] for others in stages):
        depths, names = np.linspace(0, 1, len(stages[0])), list(dict.fromkeys(stages[0]))
        axes.set_xticks([depths[np.array(stages[0]) == name].mean() for name in names], names,
                        rotation=90 if len(''.join(names)) > 40 else 0)


def _save(figure: Any, path: Path) -> bool:
    for axes in figure.axes:
        if axes.lines:
            axes.spines[['top', 'right']].set_visible(False)
            lines = dict(zip(*reversed(axes.get_legend_handles_labels())))  # by label
            if lines:
                axes.legend(lines.values(), lines, frameon=False, fontsize='small')
    drawn = any(axes.has_data() for axes in figure.axes)
    if drawn:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return drawn
