#!/usr/bin/env python3
"""Measure the channels of trained models: inhibited ones, correlations, lambda, ablation.

    python tools/analyze_channels.py configs/mask_rcnn_ce_r50.py \\
        work_dirs/mask_rcnn_ce_r50/epoch_24.pth --out channels
    python tools/analyze_channels.py CE_CONFIG CE_CHECKPOINT --against BN_CONFIG BN_CHECKPOINT \\
        --ablate --out channels

Runs the backbones of detectors or classifiers over the first validation images of the first
config, and writes report.json, figures and report.html to the folder OUT.
"""
import argparse
import copy
import json
import tempfile
from numbers import Real
from pathlib import Path

FRACTIONS = [i / 10 for i in range(10)]  # of zeroed channels
MAPS = 4  # images with a map of feature magnitudes


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of a config file')
    parser.add_argument('checkpoints', nargs='+', metavar='checkpoint',
                        help='checkpoint of the config; several are compared')
    parser.add_argument('--against', nargs=2, action='append', default=[],
                        metavar=('CONFIG', 'CHECKPOINT'),
                        help='compare with a model of another config; may be repeated')
    parser.add_argument('--out', type=Path, required=True, help='folder to write to')
    parser.add_argument('--images', type=int, default=100, metavar='N',
                        help='measure on the first N validation images (%(default)s)')
    parser.add_argument('--threshold', type=float, default=1e-2,
                        help='channels with a smaller mean |activation| are inhibited, and a '
                             'smaller |gamma| is small (%(default)s)')
    parser.add_argument('--layer', help='draw the feature magnitude of this layer of the backbone, '
                        'such as layer3 (the first CE layer; without CE, the first norm)')
    parser.add_argument('--ablate', action='store_true',
                        help='also evaluate the models with 0 to 90 %% of their channels zeroed, '
                             f'{len(FRACTIONS)} times for each seed')
    parser.add_argument('--ablated-layers', default='.*', metavar='REGEX',
                        help='zero channels of the norms of the backbone with these names (all)')
    parser.add_argument('--seeds', type=int, default=3,
                        help='number of random choices of channels to zero (%(default)s)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (%(default)s)')
    arguments = parser.parse_args()
    if arguments.images < 1 or arguments.seeds < 1:
        parser.error('--images and --seeds must be at least 1')
    return arguments


def build_loader(cfg, images):
    """Batches of the first validation images, in their order, from a data set of any type."""
    from mmengine.registry import DATASETS
    from mmengine.runner import Runner
    from torch.utils.data import Subset

    from cenet_mmdet.models.build import init_scope
    from cenet_mmdet.utils.errors import InputError, first_line

    init_scope(cfg)
    try:
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    except ValueError as error:  # numpy's, about an empty list
        raise InputError('the validation data set cannot be built; check that it has images '
                         f'({first_line(error)})') from error
    if not len(dataset):
        raise InputError('the validation data set has no images: there is nothing to measure')
    loader = {k: v for k, v in cfg.val_dataloader.items() if k in ('batch_size', 'collate_fn')}
    return Runner.build_dataloader(dict(
        loader, dataset=Subset(dataset, range(min(images, len(dataset)))), num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False)))


def build_evaluator(cfg, dataset, folder):
    """The config's `val_evaluator`, for a part of the validation images.

    A metric with an annotation file counts every image in it. So it gets a copy, in `folder`, with
    the images of the part only. Other metrics take the ground truth from the samples.
    """
    from mmengine.registry import EVALUATOR

    from cenet_mmdet.utils.errors import InputError, first_line

    config, whole = copy.deepcopy(cfg.val_evaluator), dataset.dataset
    if not (isinstance(config, dict) and 'metrics' in config):  # one metric, or a list
        config = dict(metrics=config)
    metrics = [config['metrics']] if isinstance(config['metrics'], dict) else config['metrics']
    for index, metric in enumerate(metrics if len(dataset) < len(whole) else ()):
        if metric.get('ann_file'):
            images = {whole.get_data_info(i)['img_id'] for i in dataset.indices}
            part = Path(folder).absolute() / f'annotations{index}.json'
            try:
                content = json.loads(Path(metric['ann_file']).read_text())
                for key, name in (('images', 'id'), ('annotations', 'image_id')):
                    content[key] = [entry for entry in content[key] if entry[name] in images]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{metric['ann_file']} holds no annotations in COCO's format, of "
                                 f'which a part can be taken ({first_line(error)}); evaluate on '
                                 f'all {len(whole)} images instead') from error
            part.write_text(json.dumps(content))
            metric['ann_file'] = str(part)
    evaluator = EVALUATOR.build({'type': 'Evaluator', **config})
    evaluator.dataset_meta = whole.metainfo
    return evaluator


def evaluate(model, loader, evaluator):
    """The evaluator's metrics that are numbers; none if a detector detects nothing."""
    import torch

    with torch.no_grad():
        for data in loader:
            evaluator.process(data_samples=model.val_step(data), data_batch=data)
    metrics = evaluator.evaluate(len(loader.dataset))
    return {name: float(value) for name, value in metrics.items()
            if isinstance(value, Real) or getattr(value, 'shape', None) == ()}


def measure(models, loader, arguments):
    """The report, without the ablation; images, and the maps of their feature magnitude."""
    from rich.progress import track

    from cenet_mmdet.analysis import feature_magnitude
    from cenet_mmdet.analysis.report import Report, measure_models

    def inputs(name, data):
        return models[name].data_preprocessor(data, False)['inputs']

    def batches(name):
        return (inputs(name, data) for data in track(loader, name))

    backbones = {name: model.backbone for name, model in models.items()}
    data = next(iter(loader))
    first = {name: inputs(name, data)[:MAPS] for name in models}
    report = Report(len(loader.dataset), arguments.threshold,
                    measure_models(backbones, first, batches, arguments.threshold))
    maps = {}
    for name, model in report.models.items():
        layer = arguments.layer or next(iter(model.correlation['output']))
        found = feature_magnitude(backbones[name], first[name], layer)
        maps[f'{name}\n{layer}'] = found.cpu().numpy()
    return report, [image.float().numpy() for image in data['inputs'][:MAPS]], maps


def ablate(model, loader, evaluator, arguments):
    """Metrics of a model as growing shares of its channels are zeroed."""
    from rich.progress import Progress

    from cenet_mmdet.analysis import ablation_curve
    from cenet_mmdet.utils.errors import InputError

    names = []
    with Progress() as progress:
        task = progress.add_task('ablation', total=len(FRACTIONS) * arguments.seeds)

        def metrics(_):
            found = evaluate(model, loader, evaluator)
            names[:] = found or names
            progress.advance(task)
            return found or dict.fromkeys(names, 0.)  # a detector that detects nothing

        curves = ablation_curve(model.backbone, metrics, arguments.ablated_layers, FRACTIONS,
                                range(arguments.seeds))
    if not curves:
        raise InputError('the evaluator returned no metric, so there is no curve to draw')
    return dict(fractions=FRACTIONS, curves={n: curve.tolist() for n, curve in curves.items()})


def main(arguments):
    from cenet_mmdet.analysis.report import short_names
    from cenet_mmdet.analysis.report_page import write_report
    from cenet_mmdet.engine.data_errors import explain_data_errors
    from cenet_mmdet.models.build import load_config, load_model

    given = [*((arguments.config, path) for path in arguments.checkpoints), *arguments.against]
    names = short_names([Path(checkpoint) for _, checkpoint in given])
    models = {name: load_model(*files).to(arguments.device) for name, files in zip(names, given)}
    cfg = load_config(arguments.config)
    with explain_data_errors(cfg):
        loader = build_loader(cfg, arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = build_evaluator(cfg, loader.dataset, folder) if arguments.ablate else None
        report, images, maps = measure(models, loader, arguments)
        for name, model in models.items() if arguments.ablate else ():
            report.models[name].ablation = ablate(model, loader, evaluator, arguments)
    write_report(report, images, maps, arguments.out)
    for model, *cells in report.table():
        print(f'{model:24}', *(f'{cell:>18}' for cell in cells))
    print(f'report  {arguments.out}/report.html\nnumbers {arguments.out}/report.json')


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
