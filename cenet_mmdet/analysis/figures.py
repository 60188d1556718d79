"""Figures of a channel report and of training logs, one function each.

A function returns False, and draws nothing, if no model has the measurement.
"""
from pathlib import Path
from typing import List, Mapping, Sequence

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from .modules import stage
from .report import Report, Series
from .training_log import Curves

# The output of BD alone equals that of the layer, and shows through the dashes.
STYLES = {'output': dict(color='black', linestyle='--')}


def inhibited(report: Report, path: Path) -> bool:
    """Share of inhibited channels by depth, and in total (Figures 1 and 4d)."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout='constrained')
    _by_depth(axes, {f'{name} ({model.inhibited_total:.1%} in total)': model.inhibited
                     for name, model in report.models.items()})
    axes.set(ylabel='share of channels', ylim=(0, None),
             title=f'channels with a mean |activation| below {report.threshold:g}')
    return _finish(figure, path)


def gammas(report: Report, path: Path) -> bool:
    """Small gamma and small effective gamma by depth (left), and Proposition 1 (right)."""
    models = {name: model for name, model in report.models.items() if model.small_gamma}
    if not models:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained')
    _by_depth(left, {name: model.small_gamma for name, model in models.items()})
    _by_depth(left, {f'{name}, effective': {norm: model.small_effective_gamma.get(norm)
                                            for norm in model.small_gamma}
                     for name, model in models.items()}, linestyle=':', marker='x')
    _by_depth(right, {name: model.gamma_growth for name, model in models.items()})
    right.axhline(1, color='grey', linewidth=0.8)
    left.set(ylabel='share of channels', ylim=(0, None),
             title=f'channels with |gamma| below {report.threshold:g}')
    right.set(ylabel='norm of gamma_hat / norm of gamma', title='Proposition 1, measured')
    return _finish(figure, path)


def correlations(report: Report, path: Path) -> bool:
    """Mean absolute correlation between channels by depth (Figure 5), a panel for each model."""
    figure, panels = plt.subplots(1, len(report.models), sharey=True, squeeze=False,
                                  figsize=(5.5 * len(report.models), 3.8), layout='constrained')
    for axes, (name, model) in zip(panels[0], report.models.items()):
        _by_depth(axes, model.correlation)
        axes.set_title(name)
    panels[0][0].set(ylabel='mean |correlation|', ylim=(0, None))  # shared by all
    return _finish(figure, path)


def operators(report: Report, path: Path) -> bool:
    """lambda, spectrum of W and spread of IR's weights of each CE layer, by depth."""
    models = {name: model for name, model in report.models.items() if model.bd_ratio}
    if not models:
        return False
    figure, (ratio, spectrum, spread) = plt.subplots(1, 3, figsize=(14, 3.8), layout='constrained')
    _by_depth(ratio, {name: model.bd_ratio for name, model in models.items()})
    for end in (min, max):
        _by_depth(spectrum, {name: {layer: end(values)
                                    for layer, values in model.eigenvalues.items()}
                             for name, model in models.items()})
    _by_depth(spread, {name: model.weights_spread for name, model in models.items()})
    ratio.set(title='lambda: 1 is BD, 0 is IR', ylim=(0, 1))
    spectrum.set(title='smallest and largest eigenvalue of W')
    spread.set(title='IR weights: deviation over images / mean', ylim=(0, None))
    return _finish(figure, path)


def ablation(report: Report, path: Path) -> bool:
    """The main metric by the share of zeroed channels, with the range of the seeds (Figure 4c)."""
    models = {name: m.ablation for name, m in report.models.items() if m.ablation}
    if not models:
        return False
    figure, axes = plt.subplots(figsize=(6, 3.8), layout='constrained')
    for name, measured in models.items():
        by_fraction = list(zip(*measured.curves[measured.main]))
        line, = axes.plot(measured.fractions, [sum(v) / len(v) for v in by_fraction], marker='.',
                          label=name)
        axes.fill_between(measured.fractions, [min(v) for v in by_fraction],
                          [max(v) for v in by_fraction], alpha=.25, color=line.get_color())
    axes.set(xlabel='share of channels zeroed', ylabel=measured.main, ylim=(0, None))
    return _finish(figure, path)


def magnitudes(images: Sequence, maps: Mapping[str, Sequence], path: Path) -> bool:
    """The images, and below them the l2 norm over a layer's channels, by model (Figure 3).

    Args:
        images: arrays (C, H, W) of any range; three channels are BGR, others are averaged.
        maps: arrays (h, w) for each image, by the label of their row.
    """
    rows, columns, (height, width) = 1 + len(maps), len(images), images[0].shape[1:]
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout='constrained',
                                  figsize=(2.6 * columns + 1, 2.7 * rows * height / width))
    for axes, image in zip(panels[0], images):
        picture = image[::-1].transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
        spread = picture.max() - picture.min()
        axes.imshow((picture - picture.min()) / (spread or 1), cmap='gray')
    top = max(float(values.max()) for of_model in maps.values() for values in of_model)
    for row, (label, of_model) in zip(panels[1:], maps.items()):
        for axes, values in zip(row, of_model):
            shown = axes.imshow(values, vmin=0, vmax=top)
        row[0].set_ylabel(label)
    figure.colorbar(shown, ax=panels.ravel().tolist(), shrink=.5)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return _finish(figure, path)


def training(runs: Mapping[str, Curves], path: Path) -> bool:
    """Inhibited share, correlation and lambda by stage over the iterations, a row for each run."""
    figure, panels = plt.subplots(len(runs), 3, figsize=(14, 3.4 * len(runs)), sharey='col',
                                  squeeze=False, layout='constrained')
    for row, (name, curves) in zip(panels, runs.items()):
        stages = list(dict.fromkeys(label for by_stage in curves.values() for label in by_stage))
        colors = plt.get_cmap('viridis')([i / len(stages) for i in range(len(stages))])
        lines = {}
        for axes, (kind, by_stage) in zip(row, curves.items()):
            axes.set(title=f'{name}: {kind}' if by_stage else '', xlabel='iteration')
            axes.axis('on' if by_stage else 'off')
            for label, color in zip(stages, colors):
                if label in by_stage:
                    lines[label], = axes.plot(*zip(*by_stage[label]), color=color, marker='.')
        row[-1].legend(list(lines.values()), list(lines), frameon=False, fontsize='small',
                       loc='center left', bbox_to_anchor=(1, 0.5))
    for axes, label in zip(panels[0], ('share of channels', 'mean |correlation|', 'lambda')):
        axes.set(ylabel=label, ylim=(0, 1 if label == 'lambda' else None))
    return _finish(figure, path)


def _by_depth(axes, series: Mapping[str, Series], **style) -> None:
    """A line for each series over its layers, from depth 0 to 1, labelled with the stages."""
    for index, (label, layers) in enumerate(series.items()):
        known = [(x, y) for x, y in zip(_depths(layers), layers.values()) if y is not None]
        if known:
            repeated = label in axes.get_legend_handles_labels()[1]
            axes.plot(*zip(*known), label=f'_{label}' if repeated else label,
                      **{'color': f'C{index}', 'marker': '.', **style, **STYLES.get(label, {})})
    axes.set_xlabel('depth in the network')
    stages = [[stage(layer) for layer in layers] for layers in series.values() if layers]
    if stages and all(others == stages[0] for others in stages):
        ticks = {}
        for name, x in zip(stages[0], _depths(stages[0])):
            ticks.setdefault(name, []).append(x)
        axes.set_xticks([sum(xs) / len(xs) for xs in ticks.values()], list(ticks),
                        rotation=90 if len(''.join(ticks)) > 40 else 0)


def _depths(layers) -> List[float]:
    return [i / max(len(layers) - 1, 1) for i in range(len(layers))]


def _finish(figure, path: Path) -> bool:
    for axes in figure.axes:
        if axes.lines:
            axes.spines[['top', 'right']].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize='small')
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
