"""Figures of a channel report: one function each, models side by side or one over the other.

`models` is the report, {name of the model: its measurements}, as `report.json` holds it.
Each function returns False, and draws nothing, where no model has the measurement.
"""
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

# The same wherever they occur; dashes, as the output of BD alone is that of BD.
POINTS = {'input': dict(color='C0', marker='.'), 'bd': dict(color='C1', marker='.'),
          'ir': dict(color='C2', marker='.'),
          'output': dict(color='black', marker='.', linestyle='--')}

Series = Dict[str, Dict[str, float]]  # by model, by layer


def by_depth(values: Series, path: Path, ylabel: str, title: str, **axis) -> bool:
    """A line for each model over its layers in order of depth, from 0 to 1."""
    values = {name: layers for name, layers in values.items() if layers}
    if not values:
        return False
    figure, axes = plt.subplots(figsize=(7, 3.6), layout='constrained')
    for name, layers in values.items():
        axes.plot(_depth(layers), list(layers.values()), marker='.', label=name)
    axes.set(xlabel='depth in the network', ylabel=ylabel, title=title, **axis)
    return _finish(figure, [axes], path)


def inhibited(models: Dict, path: Path) -> bool:
    """Share of inhibited channels by depth, and in all (Figures 1 and 4d)."""
    shares = {f"{name} ({100 * report['inhibited']['total']:.1f} % in all)":
              report['inhibited']['layers'] for name, report in models.items()}
    threshold = next(iter(models.values()))['inhibited']['threshold']
    return by_depth(shares, path, 'share of channels', ylim=(0, None),
                    title=f'channels whose mean |activation| is below {threshold:g}')


def gammas(models: Dict, path: Path) -> bool:
    """Norms of gamma, and of the effective gamma of CE, by depth; Proposition 1 beside it."""
    with_gamma = {name: report['gamma'] for name, report in models.items() if report['gamma']}
    if not with_gamma:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for name, layers in with_gamma.items():
        line, = left.plot(_depth(layers), [layer['share'] for layer in layers.values()],
                          marker='.', label=name)
        effective = {i: layer['effective_share'] for i, layer in enumerate(layers.values())
                     if 'effective_share' in layer}
        if effective:
            depth = _depth(layers)
            left.plot([depth[i] for i in effective], list(effective.values()), marker='x',
                      linestyle=':', color=line.get_color(), label=f'{name}, effective')
    left.set(xlabel='depth in the network', ylabel='share of channels', ylim=(0, None),
             title='channels with |gamma| below the threshold')
    for name, report in models.items():
        growth = {layer: p['growth'] for layer, p in report['proposition'].items()}
        if growth:
            right.plot(_depth(growth), list(growth.values()), marker='.', label=name)
    right.axhline(1, color='grey', linewidth=0.8)
    right.set(xlabel='depth in the network', ylabel='norm of gamma_hat / norm of gamma',
              title='Proposition 1, measured')
    return _finish(figure, [left, right], path)


def correlations(models: Dict, path: Path) -> bool:
    """Mean absolute correlation between channels by depth (Figure 5), a panel for each model."""
    models = {name: report['correlation'] for name, report in models.items()
              if report['correlation']}
    if not models:
        return False
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 3.6), sharey=True,
                                  squeeze=False, layout='constrained')
    for axes, (name, layers) in zip(panels[0], models.items()):
        for point in _points(layers.values()):
            chosen = {layer: values[point] for layer, values in layers.items() if point in values}
            depth = dict(zip(layers, _depth(layers)))
            axes.plot([depth[layer] for layer in chosen], list(chosen.values()), label=point,
                      **POINTS[point])
        axes.set(xlabel='depth in the network', title=name)
    panels[0][0].set(ylabel='mean |correlation|', ylim=(0, None))  # shared by all
    return _finish(figure, panels[0], path)


def operators(models: Dict, path: Path) -> bool:
    """lambda, spectrum of W and spread of IR's weights of each CE layer, by depth."""
    models = {name: report['operators'] for name, report in models.items() if report['operators']}
    if not models:
        return False
    figure, (ratio, spectrum, spread) = plt.subplots(1, 3, figsize=(13, 3.6),
                                                     layout='constrained')
    for name, layers in models.items():
        for axes, key in ((ratio, 'lambda'), (spread, 'weights_spread')):
            chosen = {layer: values[key] for layer, values in layers.items()
                      if values.get(key) is not None}
            if chosen:
                axes.plot(_depth(chosen), list(chosen.values()), marker='.', label=name)
        chosen = {layer: values['eigenvalues'] for layer, values in layers.items()
                  if values.get('eigenvalues')}
        if chosen:
            spectrum.fill_between(_depth(chosen), [min(v) for v in chosen.values()],
                                  [max(v) for v in chosen.values()], alpha=.3, label=name)
    ratio.set(title='lambda: 1 is BD, 0 is IR', ylim=(0, 1))
    spectrum.set(title='eigenvalues of W, smallest to largest', ylim=(0, None))
    spread.set(title='IR weights: deviation over images / mean', ylim=(0, None))
    for axes in (ratio, spectrum, spread):
        axes.set_xlabel('depth in the network')
    return _finish(figure, [ratio, spectrum, spread], path)


def ablation(models: Dict, path: Path) -> bool:
    """The metric by the share of channels zeroed, with the range of the seeds (Figure 4c)."""
    models = {name: report['ablation'] for name, report in models.items() if report['ablation']}
    if not models:
        return False
    figure, axes = plt.subplots(figsize=(6, 3.8), layout='constrained')
    for name, curve in models.items():
        by_fraction = list(zip(*curve['values']))
        line, = axes.plot(curve['fractions'], [sum(v) / len(v) for v in by_fraction], marker='.',
                          label=name)
        axes.fill_between(curve['fractions'], [min(v) for v in by_fraction],
                          [max(v) for v in by_fraction], alpha=.25, color=line.get_color())
    metric = next(iter(models.values()))['metric']
    axes.set(xlabel='share of channels zeroed', ylabel=metric, ylim=(0, None))
    return _finish(figure, [axes], path)


def magnitudes(images: List, maps: Dict[str, List], layer: str, path: Path) -> bool:
    """The images, and below them the l2 norm over a layer's channels, of each model (Figure 3).

    Args:
        images: RGB arrays (H, W, 3).
        maps: arrays (h, w) of each image, by model.
        layer: whose output they are taken of.
        path: to write to.
    """
    if not images or not maps:
        return False
    figure, panels = plt.subplots(1 + len(maps), len(images), squeeze=False,
                                  figsize=(2.6 * len(images), 2.2 * (1 + len(maps))),
                                  layout='constrained')
    for axes, image in zip(panels[0], images):
        axes.imshow(image)
    for row, (name, of_model) in zip(panels[1:], maps.items()):
        top = max(float(m.max()) for m in of_model)
        for axes, values in zip(row, of_model):
            shown = axes.imshow(values, vmin=0, vmax=top)
        row[0].set_ylabel(name)
        figure.colorbar(shown, ax=row.tolist(), shrink=.8)
    figure.suptitle(f'norm over the channels of {layer}')
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _points(layers: Iterable[Dict]) -> Tuple[str, ...]:
    """Where in a layer correlations were taken, in the order they are met."""
    return tuple(dict.fromkeys(point for layer in layers for point in layer))


def _depth(layers) -> List[float]:
    """Positions from 0 to 1, so that networks of different length share an axis."""
    count = len(layers)
    return [i / max(count - 1, 1) for i in range(count)]


def _finish(figure, panels, path: Path) -> bool:
    for axes in panels:
        axes.spines[['top', 'right']].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize='small')
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
