"""The first validation images of a config, and the metrics of a model on them."""
import copy
import json
from numbers import Real
from pathlib import Path
from typing import Any, Dict, Iterator

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, EVALUATOR
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..models.build import init_scope
from ..utils.errors import InputError, first_line


def build_loader(cfg: Config, images: int) -> DataLoader:
    """Batches of the first validation images, in their order.

    Its `dataset` is a `Subset` of the config's, which may be of any type, wrapped or not.

    Raises:
        InputError: the data set cannot be built, or has no images.
    """
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


def build_evaluator(cfg: Config, dataset: Subset, folder: Path) -> Evaluator:
    """The config's `val_evaluator`, for a part of the validation images.

    A metric with an annotation file counts every image in it. So it gets a copy, in `folder`, with
    the images of the part only. Other metrics take the ground truth from the samples.

    Raises:
        InputError: the dataset is a part, and an annotation file is missing or not COCO's.
    """
    config, whole = copy.deepcopy(cfg.val_evaluator), dataset.dataset
    metrics = _with_files(config) if len(dataset) < len(whole) else ()
    for index, metric in enumerate(metrics):
        images = {whole.get_data_info(i)['img_id'] for i in dataset.indices}
        part = Path(folder).absolute() / f'annotations{index}.json'
        try:
            content = json.loads(Path(metric['ann_file']).read_text())
            for key, name in (('images', 'id'), ('annotations', 'image_id')):
                content[key] = [entry for entry in content[key] if entry[name] in images]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{metric['ann_file']} holds no annotations in COCO's format, of "
                             f'which a part can be taken ({first_line(error)}); evaluate on all '
                             f'{len(whole)} images instead') from error
        part.write_text(json.dumps(content))
        metric['ann_file'] = str(part)
    if not (isinstance(config, dict) and 'metrics' in config):  # one metric, or a list
        config = dict(metrics=config)
    evaluator = EVALUATOR.build({'type': 'Evaluator', **config})
    evaluator.dataset_meta = whole.metainfo
    return evaluator


def _with_files(node: Any) -> Iterator[Dict]:
    """The configs of metrics with an annotation file, at any depth."""
    if isinstance(node, dict) and node.get('ann_file'):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _with_files(part)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, evaluator: Evaluator) -> Dict[str, float]:
    """The evaluator's metrics that are numbers; none if a detector detects nothing."""
    for data in loader:
        evaluator.process(data_samples=model.val_step(data), data_batch=data)
    metrics = evaluator.evaluate(len(loader.dataset))
    return {name: float(value) for name, value in metrics.items()
            if isinstance(value, Real) or getattr(value, 'shape', None) == ()}
