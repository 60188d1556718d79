#!/usr/bin/env python3
"""Make the tables and pictures of docs/evidence.md and adopt.md from docs/evidence/results.jsonl.

    python tools/dev/evidence_page.py
    python tools/dev/evidence_page.py --check

A table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`. A picture records the
results that it shows in its file, so that --check finds a stale one.
"""
import argparse
import hashlib
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Callable, Dict, List, Tuple

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / 'docs' / name for name in ('evidence.md', 'adopt.md')]
FOLDER = ROOT / 'docs' / 'evidence'
RESULTS = FOLDER / 'results.jsonl'
DECAYS = (5e-4, 1e-3, 2e-3, 4e-3)
MOST_INHIBITED = 2e-3  # the decay of all runs but those that vary it
COLOURS = {None: 'C7', 'ce': 'C0', 'bd': 'C2', 'ir': 'C1'}
LABELS = {None: 'BN', 'ce': '+ CE', 'bd': '+ BD alone', 'ir': '+ IR alone'}
NETWORKS = {('bn', 'relu'): 'BN, ReLU', ('ln', 'relu'): 'LN, ReLU', ('bn', 'elu'): 'BN, ELU',
            ('bn', 'leakyrelu'): 'BN, LeakyReLU', ('iternorm', 'relu'): 'IterNorm, ReLU'}

Runs = List[Dict]
Results = Dict[Tuple, Runs]


def read_results(lines: List[str]) -> Results:
    """Runs by (norm, act, ce, weight decay, corrupted) or ('shapes', model), one for each seed."""
    results: Results = defaultdict(list)
    for run in map(json.loads, lines):
        key = ('shapes', run['model']) if run.get('experiment') == 'shapes' else tuple(
            run['config'][name] for name in ('norm', 'act', 'ce', 'weight_decay', 'corrupted'))
        results[key].append(run)
    return results


def find(results: Results, ce=None, norm='bn', act='relu', decay=MOST_INHIBITED,
         corrupted=0.) -> Runs:
    return results.get((norm, act, ce, decay, corrupted), [])


def last(runs: Runs, name: str) -> List[float]:
    """The value of each seed after the last epoch."""
    return [run['epochs'][-1][name] for run in runs]


def cell(values: List[float], digits: int = 1) -> str:
    """Mean, and each seed's value in brackets."""
    if not values:
        return 'not run'
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) == 1 else (
        f'{mean} ({", ".join(f"{value:.{digits}f}" for value in values)})')


def table(head: List[str], rows: List[List[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def decay_table(name: str) -> Callable[[Results], str]:
    """A row for each branch, a column for each weight decay (Figures 4d and 4e)."""
    def make(results: Results) -> str:
        return table(['', *(f'{decay:g}' for decay in DECAYS)],
                     [[LABELS[ce], *(cell(last(find(results, ce, decay=decay), name))
                                     for decay in DECAYS)] for ce in LABELS])
    return make


def layers_table(results: Results) -> str:
    """Inhibited channels of each layer, in percent."""
    rows = [[LABELS[ce], *(cell([run['epochs'][-1]['inhibited_by_layer'][layer] for run in runs])
                           for layer in range(8))]
            for ce in LABELS for runs in [find(results, ce)]]
    return table(['', *(f'layer {layer + 1}' for layer in range(8))], rows)


def networks_table(results: Results) -> str:
    """Other norms and activations (Figures 1a and 1b)."""
    rows = []
    for (norm, act), label in NETWORKS.items():
        without, with_ce = (find(results, ce, norm, act) for ce in (None, 'ce'))
        cells = ['-' if runs is with_ce and norm == 'iternorm' else cell(last(runs, name))
                 for name in ('inhibited', 'accuracy') for runs in (without, with_ce)]
        rows.append([label, *cells])
    return table(['', 'inhibited', 'with CE', 'accuracy', 'with CE'], rows)


def stopped(run: Dict, loss: float) -> Dict:
    """The first epoch whose training loss is not above `loss`, or the last one."""
    return next((epoch for epoch in run['epochs'] if epoch['loss'] <= loss), run['epochs'][-1])


def noise_rows(results: Results):
    """(share, BN, CE stopped at BN's loss, CE at the end): test errors of the first seed."""
    for share in (0., 0.2, 0.4, 0.6):
        pair = [[run for run in find(results, ce, corrupted=share) if run['config']['seed'] == 0]
                for ce in (None, 'ce')]
        if all(pair):
            (bn, ), (ce, ) = pair
            loss = bn['epochs'][-1]['loss']
            yield (share, *(100 - epoch['accuracy'] for epoch in (
                bn['epochs'][-1], stopped(ce, loss), ce['epochs'][-1])))


def noise_table(results: Results) -> str:
    rows = [[f'{share:.0%}', *(f'{error:.1f}' for error in errors)]
            for share, *errors in noise_rows(results)]
    return table(['corrupted labels', 'BN', '+ CE, stopped at the loss of BN', '+ CE, to the end'],
                 rows)


def shapes_cell(results: Results, model: str, metric: str) -> str:
    return cell([run['scalars'][metric] * (1 if metric.startswith('accuracy') else 100)
                 for run in results.get(('shapes', model), [])])


def detectors_table(results: Results) -> str:
    """Table 5 in miniature."""
    rows = [[label, shapes_cell(results, f'classifier {kind}', 'accuracy/top1'),
             *(shapes_cell(results, f'detector {name}', f'coco/{what}_mAP')
               for what in ('bbox', 'segm'))]
            for label, kind, name in (
                ('BN', 'bn', 'bn'), ('+ CE, statistics and parameters frozen', 'ce', 'ce frozen'),
                ('+ SyncCE, lambda and F frozen, two ranks', 'ce', 'syncce'),
                ('+ CE, everything learns', 'ce', 'ce'))]
    return table(['backbone', 'accuracy of the classifier', 'box AP', 'mask AP'], rows)


def put_in_table(results: Results) -> str:
    """CE put into a trained network, with and without `identity_start`."""
    rows = [[label, shapes_cell(results, f'put in {name}', 'coco/bbox_mAP'),
             shapes_cell(results, f'detector {name}', 'coco/bbox_mAP')]
            for label, name in (
                ('batch norm classifier, no CE', 'bn'), ('the same, CE inserted', 'ce inserted'),
                ('the same, `identity_start=True`', 'ce inserted, identity_start'))]
    rows.append(['classifier trained with CE', '', shapes_cell(results, 'detector ce',
                                                               'coco/bbox_mAP')])
    return table(['start of the backbone', 'box AP of the trained detector with CE put in, '
                  'untrained', 'box AP after 4 epochs of fine-tuning'], rows)


TABLES: Dict[str, Callable[[Results], str]] = {
    'inhibited by weight decay': decay_table('inhibited'),
    'accuracy by weight decay': decay_table('accuracy'),
    'inhibited by layer': layers_table,
    'norms and activations': networks_table,
    'corrupted labels': noise_table,
    'detectors': detectors_table,
    'identity start': put_in_table,
}


def plot_seeds(axes, places, columns, **style) -> None:
    """A line through the means of the columns, and a dot for each seed."""
    known = [(place, values) for place, values in zip(places, columns) if values]
    axes.plot([place for place, _ in known], [statistics.mean(v) for _, v in known], **style)
    for place, values in known:
        axes.plot([place] * len(values), values, linestyle='', marker='.', color=style['color'])


def draw_inhibited(results: Results, figure) -> None:
    training, depth = figure.subplots(1, 2)
    for ce in LABELS:
        for index, run in enumerate(find(results, ce)):
            style = dict(color=COLOURS[ce], label=None if index else LABELS[ce])
            training.plot(range(1, len(run['epochs']) + 1),
                          [epoch['inhibited'] for epoch in run['epochs']], **style)
            depth.plot(range(1, 9), run['epochs'][-1]['inhibited_by_layer'], marker='.', **style)
    training.set(xlabel='epoch', ylabel='inhibited channels, %', title='over training')
    depth.set(xlabel='layer', title='after training')
    depth.legend(frameon=False)


def draw_decay(results: Results, figure) -> None:
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, 'inhibited', 'inhibited channels, %'),
                              (right, 'accuracy', 'test accuracy, %')):
        for ce in LABELS:
            plot_seeds(axes, DECAYS, [last(find(results, ce, decay=decay), name)
                                      for decay in DECAYS], color=COLOURS[ce], label=LABELS[ce])
        axes.set(xlabel='weight decay', ylabel=label, xscale='log')
        axes.set_xticks(DECAYS, [f'{decay:g}' for decay in DECAYS], minor=False)
        axes.minorticks_off()
    left.legend(frameon=False)


def draw_networks(results: Results, figure) -> None:
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, 'inhibited', 'inhibited channels, %'),
                              (right, 'accuracy', 'test accuracy, %')):
        for place, (norm, act) in enumerate(NETWORKS):
            for ce in (None, 'ce'):
                values = last(find(results, ce, norm, act), name)
                axes.plot([place] * len(values), values, linestyle='', marker='o',
                          color=COLOURS[ce], label=('without CE', 'with CE')[bool(ce)])
        axes.set(ylabel=label)
        axes.set_xticks(range(len(NETWORKS)), [label.replace(', ', '\n')
                                               for label in NETWORKS.values()])
    handles, labels = left.get_legend_handles_labels()
    left.legend(*zip(*dict(zip(labels, zip(handles, labels))).values()), frameon=False)


def draw_noise(results: Results, figure) -> None:
    axes = figure.subplots()
    rows = list(noise_rows(results))
    for column, (label, style) in enumerate((
            ('BN', dict(color='C7')), ('+ CE, stopped at the loss of BN', dict(color='C0')),
            ('+ CE, to the end', dict(color='C0', linestyle=':'))), start=1):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], marker='o',
                  label=label, **style)
    axes.set(xlabel='share of corrupted labels', ylabel='test error, %')
    axes.legend(frameon=False)


def draw_ablation(results: Results, figure) -> None:
    for axes, layers, title in zip(figure.subplots(1, 2, sharey=True), ('first', 'all'),
                                   ('channels of the first norm', 'channels of all norms')):
        for ce in LABELS:
            for run in find(results, ce):
                for draw in run['ablation'][layers]:
                    axes.plot([i / 10 for i in range(10)], draw, color=COLOURS[ce], alpha=0.4,
                              linewidth=0.8)
            draws = [draw for run in find(results, ce) for draw in run['ablation'][layers]]
            if draws:
                axes.plot([i / 10 for i in range(10)], [statistics.mean(v) for v in zip(*draws)],
                          color=COLOURS[ce], label=LABELS[ce])
        axes.set(xlabel='share of channels set to zero', title=title)
    axes.legend(frameon=False)
    figure.axes[0].set(ylabel='test accuracy, %')


def draw_magnitudes(results: Results, figure) -> None:
    maps = {ce: find(results, ce)[0]['magnitude'] for ce in LABELS if find(results, ce)}
    largest = max(value for grid in maps.values() for row in grid for value in row)
    grids = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (ce, grid) in zip(grids, maps.items()):
        shown = axes.imshow(grid, vmin=0, vmax=largest)
        mean = statistics.mean(value for row in grid for value in row)
        axes.set(title=f'{LABELS[ce]}: {mean:.2f}', xticks=[], yticks=[])
    figure.colorbar(shown, ax=list(grids), shrink=0.8)


def draw_correlations(results: Results, figure) -> None:
    depth, shallow, deep = figure.subplots(1, 3, sharey=True)
    for ce in LABELS:
        for run in find(results, ce)[:1]:
            history = [epoch['correlation_by_layer'] for epoch in run['epochs']]
            style = dict(color=COLOURS[ce], label=LABELS[ce])
            depth.plot(range(1, 9), history[-1], marker='.', **style)
            for axes, layer in ((shallow, 1), (deep, 6)):
                axes.plot(range(1, len(history) + 1), [layers[layer] for layers in history],
                          **style)
    depth.set(xlabel='layer', ylabel='mean |correlation| of channels', title='after training')
    shallow.set(xlabel='epoch', title='layer 2')
    deep.set(xlabel='epoch', title='layer 7')
    depth.legend(frameon=False)


PICTURES = {
    'inhibited.png': (draw_inhibited, (9, 3.4)),
    'weight_decay.png': (draw_decay, (9, 3.6)),
    'norms.png': (draw_networks, (10, 3.6)),
    'corrupted_labels.png': (draw_noise, (5, 3.6)),
    'ablation.png': (draw_ablation, (9, 3.6)),
    'magnitudes.png': (draw_magnitudes, (9, 2.6)),
    'correlations.png': (draw_correlations, (11, 3.4)),
}


def with_tables(page: str, results: Results) -> str:
    """The page with every table made anew."""
    def made(match: 're.Match') -> str:
        return f'{match[1]}\n{TABLES[match[2]](results)}\n{match[3]}'
    return re.sub(r'(<!-- table: (.*?) -->)\n.*?\n?(<!-- end -->)', made, page, flags=re.DOTALL)


def digest() -> str:
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


def stale() -> List[str]:
    """Names of what does not follow from the results."""
    from PIL import Image

    results = read_results(RESULTS.read_text().splitlines())
    pictures = [name for name in PICTURES
                if Image.open(FOLDER / name).info.get('Source') != digest()]
    return pictures + [page.name for page in PAGES
                       if with_tables(page.read_text(), results) != page.read_text()]


def draw_pictures(results: Results) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    for name, (draw, size) in PICTURES.items():
        figure = plt.figure(figsize=size, layout='constrained')
        draw(results, figure)
        for axes in figure.axes:
            axes.spines[['top', 'right']].set_visible(False)
        figure.savefig(FOLDER / name, dpi=110, metadata={'Source': digest()})
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit with 1 if a '
                        'table or picture does not follow from the results')
    if parser.parse_args().check:
        names = stale()
        sys.exit(f'stale: {", ".join(names)}; run tools/dev/evidence_page.py' if names else 0)
    results = read_results(RESULTS.read_text().splitlines())
    draw_pictures(results)
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), results))


if __name__ == '__main__':
    main()
