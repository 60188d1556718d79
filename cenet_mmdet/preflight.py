"""Finds missing files before a run starts, and says how to supply them."""
from pathlib import Path
from typing import Iterator, List

from mmengine.config import Config, ConfigDict

WEIGHTS_FIX = (
    'Put the file there, name it in the environment variable that the config reads '
    '(CE_RESNET50_CHECKPOINT, RESNET50_CHECKPOINT and the like), or pass '
    '--cfg-options model.backbone.init_cfg.checkpoint=FILE.')


def missing_files(cfg: Config, splits=('train', 'val', 'test')) -> List[str]:
    """One line for each file or folder that the run would need and that is not there.

    Covers the annotations and images of the data sets, `load_from`, and, when
    training, pretrained weights. Files with a scheme (`torchvision://`, `s3://`)
    are left to MMEngine.

    Args:
        cfg: an MMEngine config.
        splits: which of train, val and test the run uses.
    """
    problems = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in _datasets(loader.dataset) if loader else ():
            problems += _missing_data(dataset)
    if cfg.get('load_from'):
        problems += _missing('checkpoint', cfg.load_from, 'Give the path of an existing one.')
    if 'train' in splits:
        for checkpoint in _pretrained(cfg.model):
            problems += _missing('pretrained weights', checkpoint, WEIGHTS_FIX)
    return list(dict.fromkeys(problems))


def _missing_data(dataset: ConfigDict) -> List[str]:
    root = Path(dataset.get('data_root') or '')
    fix = ('Set COCO_ROOT to the folder that holds annotations/, train2017/ and val2017/ '
           f'(now {root}).')
    problems = []
    if dataset.get('ann_file'):
        problems += _missing('annotations', root / dataset.ann_file, fix)
    for folder in (dataset.get('data_prefix') or {}).values():
        problems += _missing('images', root / folder, fix)
    return problems


def _missing(what: str, path, fix: str) -> List[str]:
    if '://' in str(path) or Path(path).exists():
        return []
    return [f'{what} not found: {path}. {fix}']


def _datasets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get('datasets', [dataset['dataset']] if 'dataset' in dataset else [])
    for wrapped in inner:
        yield from _datasets(wrapped)
    if not inner:
        yield dataset


def _pretrained(node) -> Iterator[str]:
    """Checkpoints of every `init_cfg` of type Pretrained in a model config."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and node.get('checkpoint'):
            yield node['checkpoint']
        children = node.values()
    else:
        children = node if isinstance(node, (list, tuple)) else ()
    for child in children:
        yield from _pretrained(child)
