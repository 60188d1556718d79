#!/usr/bin/env python3
"""See the channels of trained models: silent ones, correlations, lambda, ablation.

    python tools/analyze_channels.py configs/mask_rcnn_ce_r50.py \\
        work_dirs/mask_rcnn_ce_r50/epoch_24.pth --out channels
    python tools/analyze_channels.py CE_CONFIG CE_CHECKPOINT --against BN_CONFIG BN_CHECKPOINT \\
        --ablate --out channels

Runs the backbones over the validation images of the first config, and writes report.json,
figures and report.html to OUT. --against adds a model of another config, with or without CE;
further checkpoints of the same config are simply listed. --ablate also evaluates the models
with growing shares of their channels zeroed, which takes an evaluation for each point.
"""
import argparse
import copy
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from cenet_mmdet.utils.errors import exit_on_input_error

FRACTIONS = (0., 0.1, 0.2, 0.3, 0.5, 0.7)
MAPS = 4  # images with a map of feature magnitudes
METRICS = 'coco/segm_mAP', 'coco/bbox_mAP', 'accuracy/top1'  # the first there is, is drawn
COLUMNS = 'inhibited', 'small |gamma|', 'mean |correlation|', 'lambda'
# Figures by the names of their functions: title, and what they show.
SECTIONS = {
    'inhibited': ('Inhibited channels', 'Share of channels behind each rectifier whose mean '
                  'absolute activation over images and positions is below the threshold '
                  '(Figures 1 and 4d of the paper).'),
    'gammas': ('Gamma', 'Left: share of channels of each norm with |gamma| below the threshold; '
               'dotted, of the effective W gamma behind CE. Right: how much the norm of gamma '
               'grows by batch decorrelation (Proposition 1).'),
    'magnitudes': ('Magnitude of features', 'The l2 norm over channels at each position '
                   '(Figure 3); one colour scale for each model.'),
    'correlations': ('Correlation between channels', 'Mean absolute correlation of all pairs of '
                     'channels that vary: in front of CE, behind BD and IR by themselves, and '
                     'behind CE; without CE, behind the norms that CE follows in the other models, '
                     'or all norms (Figure 5).'),
    'operators': ('What CE learned', 'lambda, the range of the eigenvalues of W, and how much '
                  "IR's weights differ between images."),
    'ablation': ('Cumulative ablation', 'The metric as random channels of the norms are zeroed; '
                 'line and band are mean and range of the seeds (Figures 1c and 4c).'),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoints', nargs='+', metavar='checkpoint')
    parser.add_argument('--against', nargs=2, action='append', default=[],
                        metavar=('CONFIG', 'CHECKPOINT'), help='one more model; may be repeated')
    parser.add_argument('--out', type=Path, required=True, help='folder to write to')
    parser.add_argument('--images', type=int, default=100, help='at most (%(default)s)')
    parser.add_argument('--threshold', type=float, default=1e-2,
                        help='of the mean absolute activation, and of |gamma|, below which a '
                             'channel counts as inhibited (%(default)s)')
    parser.add_argument('--layer', default='layer3',
                        help='of the backbone, for the maps of magnitude (%(default)s)')
    parser.add_argument('--ablate', action='store_true', help='with ablation curves')
    parser.add_argument('--ablated-layers', default='.*', metavar='REGEX',
                        help="names of the backbone's norms whose channels are zeroed (all)")
    parser.add_argument('--seeds', type=int, default=3, help='of the ablation (%(default)s)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (%(default)s)')
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f'--images must be at least 1, got {arguments.images}')
    return arguments


def named_models(arguments):
    """Config and checkpoint by the shortest names that tell them apart."""
    given = [(arguments.config, Path(c)) for c in arguments.checkpoints]
    given += [(config, Path(checkpoint)) for config, checkpoint in arguments.against]
    paths = [path.with_suffix('').absolute() for _, path in given]
    for names in ([path.name for path in paths], [path.parent.name for path in paths],
                  ['/'.join(path.parts[-2:]) for path in paths], [str(path) for path in paths]):
        if len(set(names)) == len(given):
            return dict(zip(names, given))
    sys.exit('the same checkpoint is given twice: ' + ', '.join(str(path) for _, path in given))


def build_loader(config, images, folder):
    """The config's validation images, the first `images` of them, and its evaluator.

    COCO's metric counts every image of its annotation file, so a part of them is written
    to a file of its own.
    """
    from mmengine.evaluator import Evaluator
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from cenet_mmdet.engine.preflight import missing_files
    from cenet_mmdet.models.build import load_config

    cfg = load_config(config)
    cfg.load_from = None
    cfg.model.backbone.init_cfg = None
    problems = missing_files(cfg, ('val', ))
    if problems:
        sys.exit('\n'.join(problems))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    loader = cfg.val_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    dataset = loader.dataset
    if 'ann_file' in dataset and dataset.ann_file.endswith('.json'):
        dataset.ann_file = part_of(Path(dataset.get('data_root', '')) / dataset.ann_file, images,
                                   folder)
        cfg.val_evaluator.ann_file = dataset.ann_file
    else:
        dataset.indices = images
    loader = Runner.build_dataloader(loader)
    evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    return loader, evaluator


def part_of(annotations, count, folder):
    """The absolute path of an annotation file with the first `count` images."""
    content = json.loads(annotations.read_text())
    content['images'] = content['images'][:count]
    if not content['images']:
        sys.exit(f'{annotations} has no images: there is nothing to measure')
    kept = {image['id'] for image in content['images']}
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in kept]
    path = Path(folder).absolute() / 'annotations.json'
    path.write_text(json.dumps(content))
    return str(path)


def backbone_inputs(model, data, device):
    """A batch as the backbone gets it."""
    inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
    return inputs.to(device)


def find_pairs(models, loader, arguments):
    """Of each model, the norms that CE follows with their CE layers, by name."""
    from cenet_mmdet.analysis import norm_ce_pairs

    data = next(iter(loader))
    pairs = {}
    for name, model in models.items():
        inputs = backbone_inputs(model, data, arguments.device)[:1]
        pairs[name] = norm_ce_pairs(model.backbone, lambda m=model, x=inputs: m.backbone(x))
    return pairs


def compared_norms(model, pairs):
    """Names of a model's norms that have CE behind them in one of the others, if it has none."""
    from cenet_mmdet import CE

    if any(isinstance(module, CE) for module in model.backbone.modules()):
        return None
    modules = dict(model.backbone.named_modules())
    names = {norm for found in pairs.values() for norm in found if norm in modules}
    return [re.escape(norm) for norm in sorted(names)] or None


def measure(model, loader, arguments, pairs, norms):
    """All but the ablation, from one pass over the images.

    Args:
        pairs: norms and CE layers behind them, by name.
        norms: names of norms to correlate the outputs of, None for CE layers or all norms.
    """
    from contextlib import ExitStack

    import torch
    from rich.progress import track

    from cenet_mmdet import analysis

    backbone = model.backbone
    collectors = dict(inhibited=analysis.ChannelMagnitudes(backbone),
                      correlation=analysis.ChannelCorrelations(backbone, norms))
    with_bd = [ce for ce in pairs.values() if backbone.get_submodule(ce).has_bd]
    with_ir = [ce for ce in pairs.values() if backbone.get_submodule(ce).has_ir]
    if with_bd:
        collectors['proposition'] = analysis.GammaGrowth(backbone, pairs)
    if with_ir and len(loader.dataset) > 1:
        collectors['spread'] = analysis.ReweightingSpread(backbone)
    with ExitStack() as stack, torch.no_grad():
        for collector in collectors.values():
            stack.enter_context(collector)
        for data in track(loader, 'images'):
            backbone(backbone_inputs(model, data, arguments.device))
    results = {name: collector.result() for name, collector in collectors.items()}
    inhibited = results['inhibited']._replace(threshold=arguments.threshold)
    return dict(
        inhibited=dict(threshold=inhibited.threshold, total=inhibited.share,
                       layers=inhibited.shares),
        gamma=gamma_entries(backbone, pairs, arguments.threshold),
        proposition={name: dict(raised=growth.share, growth=growth.ratio)
                     for name, growth in results.get('proposition', {}).items()},
        correlation={name: {point: c.mean for point, c in points.items() if c.varying > 1}
                     for name, points in results['correlation'].items()},
        operators=operator_entries(backbone, results.get('spread', {})),
        ablation=None)


def gamma_entries(backbone, pairs, threshold):
    from cenet_mmdet.analysis import gammas

    entries = {}
    for name, gamma in gammas(backbone, pairs, threshold).items():
        entries[name] = dict(share=gamma.share)
        if gamma.effective is not None:
            entries[name]['effective_share'] = gamma.effective_share
    return entries


def operator_entries(backbone, spreads):
    """lambda, eigenvalues of W and spread of IR's weights of each CE layer."""
    from cenet_mmdet import CE
    from cenet_mmdet.analysis import lambdas, spectra

    layers = {name: ce for name, ce in backbone.named_modules() if isinstance(ce, CE)}
    if not layers:
        return {}
    entries = {name: {'lambda': ratio} for name, ratio in lambdas(backbone).items()}
    if any(ce.has_bd for ce in layers.values()):
        for name, spectrum in spectra(backbone).items():
            entries[name].update(eigenvalues=spectrum.eigenvalues.flatten().tolist(),
                                 condition=spectrum.condition.max().item())
    for name, spread in spreads.items():
        entries[name]['weights_spread'] = spread.mean
    return entries


def ablate(model, loader, evaluator, arguments):
    """The metric as growing shares of channels are zeroed."""
    import torch
    from rich.progress import Progress

    from cenet_mmdet.analysis import ablation_curve

    seeds = range(arguments.seeds)
    chosen = []
    with Progress() as progress:
        task = progress.add_task('ablation', total=len(FRACTIONS) * len(seeds) * len(loader))

        @torch.no_grad()
        def evaluate(_):
            for data in loader:
                evaluator.process(data_samples=model.val_step(data), data_batch=data)
                progress.advance(task)
            metrics = evaluator.evaluate(len(loader.dataset))
            chosen[:] = chosen or [name for name in METRICS if name in metrics]
            return metrics.get(chosen[0], 0.) if chosen else 0.  # no detection at all

        curve = ablation_curve(model.backbone, evaluate, arguments.ablated_layers, FRACTIONS,
                               seeds)
    if not chosen:
        sys.exit(f'no metric to draw: the evaluator returned none of {", ".join(METRICS)}')
    return dict(metric=chosen[0], fractions=list(FRACTIONS), values=curve.tolist())


def draw_maps(models, loader, arguments, path):
    """Figure 3 for the first images, of all models."""
    import torch

    from cenet_mmdet.analysis import feature_magnitude
    from cenet_mmdet.analysis.figures import magnitudes

    data = next(iter(loader))
    images, maps = [], {}
    for name, model in models.items():
        inputs = backbone_inputs(model, data, arguments.device)[:MAPS]
        maps[name] = list(feature_magnitude(model.backbone, inputs, arguments.layer).cpu().numpy())
        images = [torch.nn.functional.interpolate(image[None].float(), inputs.shape[2:])[0]
                  for image in data['inputs'][:MAPS]]
    pictures = [image.flip(0).permute(1, 2, 0).byte().numpy() for image in images]
    return magnitudes(pictures, maps, arguments.layer, path)


def write_report(report, maps, out, images):
    """Figures, the page, and the numbers last, so that these say that all is there."""
    from cenet_mmdet.analysis import figures
    from cenet_mmdet.analysis.report_page import write_page

    sections = []
    for name, (title, explanation) in SECTIONS.items():
        path = out / f'{name}.png'
        if maps(path) if name == 'magnitudes' else getattr(figures, name)(report, path):
            sections.append((title, explanation, path))
    rows = [('model', *COLUMNS), *((name, *summary(of_model))
                                   for name, of_model in report.items())]
    write_page(out / 'report.html', 'Channels', f'{len(report)} models on {images} images.',
               sections, {'Summary': rows})
    unfinished = out / '.report.json.part'
    unfinished.write_text(json.dumps(dict(images=images, models=report), indent=1))
    os.replace(unfinished, out / 'report.json')
    return sections


def summary(of_model):
    """A model's row: shares in per cent, means over its layers."""
    gamma = [layer['share'] for layer in of_model['gamma'].values()]
    last = [points['output'] for points in of_model['correlation'].values() if 'output' in points]
    ratios = [layer['lambda'] for layer in of_model['operators'].values()]
    return (f"{100 * of_model['inhibited']['total']:.1f} %",
            *(f'{scale * sum(values) / len(values):.{digits}f}{unit}' if values else '-'
              for values, scale, digits, unit in ((gamma, 100, 1, ' %'), (last, 1, 3, ''),
                                                  (ratios, 1, 2, ''))))


def main():
    arguments = parse_args()
    given = named_models(arguments)

    from rich.console import Console
    from rich.table import Table

    from cenet_mmdet.models.build import load_model

    models = {name: load_model(config, checkpoint).to(arguments.device)
              for name, (config, checkpoint) in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        loader, evaluator = build_loader(arguments.config, arguments.images, folder)
        report = {}
        try:
            pairs = find_pairs(models, loader, arguments)
            for name, model in models.items():
                report[name] = measure(model, loader, arguments, pairs[name],
                                       compared_norms(model, pairs))
                if arguments.ablate:
                    report[name]['ablation'] = ablate(model, loader, evaluator, arguments)
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_report(report, lambda path: draw_maps(models, loader, arguments, path),
                         arguments.out, len(loader.dataset))
        except ValueError as error:  # of the measurements, which name layer and remedy
            sys.exit(str(error))
    table = Table(title=f'{len(loader.dataset)} images')
    for column in ('model', *COLUMNS):
        table.add_column(column, justify='left' if column == 'model' else 'right')
    for name, of_model in report.items():
        table.add_row(name, *summary(of_model))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f'report  {arguments.out}/report.html\nnumbers {arguments.out}/report.json',
                  highlight=False)


if __name__ == '__main__':
    with exit_on_input_error():
        main()
