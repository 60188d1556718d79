"""Finds missing and damaged files before a run starts, and says how to supply them."""
import pickle
import zipfile
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import torch
from mmengine.config import Config, ConfigDict

WEIGHTS_FIX = (
    'Put the file there, name it in the environment variable that the config reads '
    '(CE_RESNET50_CHECKPOINT, RESNET50_CHECKPOINT and the like), or pass '
    '--cfg-options model.backbone.init_cfg.checkpoint=FILE.')


# Data sets without an annotation file: the variable that the configs read, and the folder
# below it, which is that of the split where none is given.
CLASSIFICATION = {
    'ImageNet': ('IMAGENET_ROOT', None),
    'CIFAR10': ('CIFAR10_ROOT', 'cifar-10-batches-py'),
    'CorruptedCIFAR10': ('CIFAR10_ROOT', 'cifar-10-batches-py'),
}

# What MMEngine reads from a checkpoint to go on with a run.
RESUMABLE = ('meta', 'state_dict', 'optimizer', 'message_hub')


def missing_files(cfg: Config, splits=('train', 'val', 'test')) -> List[str]:
    """One line for each file or folder that the run needs and that is missing or damaged.

    Covers the annotations and images of the data sets, `load_from` or the
    checkpoint to resume from, and, when training, pretrained weights. Files
    with a scheme (`torchvision://`, `s3://`) are left to MMEngine.

    Args:
        cfg: an MMEngine config, with its `work_dir` where `resume` is set.
        splits: which of train, val and test the run uses.
    """
    problems = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in _datasets(loader.dataset) if loader else ():
            problems += _missing_data(dataset)
    if cfg.get('resume'):
        problems += _not_resumable(cfg)
    elif cfg.get('load_from'):
        problems += _unreadable('checkpoint', cfg.load_from, 'Give the path of another one.')
    if 'train' in splits:
        for network, init_cfg in _pretrained(cfg.model):
            problems += (_unreadable('pretrained weights', init_cfg['checkpoint'], WEIGHTS_FIX)
                         or _whole_model(network, init_cfg))
    return list(dict.fromkeys(problems))


def _not_resumable(cfg: Config) -> List[str]:
    """What keeps a run from going on, from `load_from` or from its last checkpoint."""
    path = cfg.get('load_from')
    if not path:
        pointer = Path(cfg.work_dir) / 'last_checkpoint'
        if not pointer.is_file():
            return []  # nothing to resume: MMEngine says so and starts
        path = pointer.read_text().strip() or pointer
    others = sorted(Path(path).parent.glob('*.pth'), key=lambda file: file.stat().st_mtime)
    others = [str(file) for file in reversed(others) if file != Path(path)]
    fix = 'Resume from an intact one' + (f': --resume {others[0]}' if others else '.')
    problems = _unreadable('checkpoint', path, fix)
    if not problems and '://' not in str(path):
        lacking = [key for key in RESUMABLE if key not in _load(path)]
        if lacking:
            problems = [f'not a checkpoint that a run can be resumed from: {path} has no '
                        f'{", ".join(lacking)}. To start a new run from its weights, pass '
                        f'--cfg-options load_from={path} instead of --resume.']
    return problems


def _unreadable(what: str, path, fix: str) -> List[str]:
    problems = _missing(what, path, fix)
    if problems or '://' in str(path):
        return problems
    if _load(path) is None:
        return [f'{what} damaged: {path} is truncated or was not written by torch.save. {fix}']
    return []


def _load(path) -> Optional[dict]:
    """The checkpoint, its tensors left on the disk where the format allows; None if unreadable."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=False,
                                mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        return None
    return checkpoint if isinstance(checkpoint, dict) else None


def _missing_data(dataset: ConfigDict) -> List[str]:
    root = Path(dataset.get('data_root') or '')
    if dataset.get('type') in CLASSIFICATION:
        variable, folder = CLASSIFICATION[dataset.type]
        folder = folder or dataset.split
        return _missing('images', root / folder,
                        f'Set {variable} to the folder that holds {folder}/ (now {root}).')
    fix = (f'Set COCO_ROOT to the folder that holds annotations/ and images (now {root}), and '
           'COCO_YEAR=2014 if they are the files of 2014.')
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


def _pretrained(node, network: str = '') -> Iterator[Tuple[str, dict]]:
    """Every `init_cfg` of type Pretrained in a model config, and the type of what it belongs to."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and node.get('checkpoint'):
            yield network, node
        children, network = node.values(), node.get('type', network)
    else:
        children = node if isinstance(node, (list, tuple)) else ()
    for child in children:
        yield from _pretrained(child, network)


def _whole_model(network: str, init_cfg: dict) -> List[str]:
    """MMEngine would load nothing and only warn where a prefix is needed and not given."""
    path = init_cfg['checkpoint']
    if '://' in str(path) or init_cfg.get('prefix') or network.startswith('CE'):
        return []  # CE backbones find themselves in whole models
    checkpoint = _load(path)
    entries = checkpoint.get('state_dict', checkpoint)
    if not any(key.startswith('backbone.') for key in entries):
        return []
    return [f'{path} holds a whole model, in which {network} would find none of its weights. Add '
            '--cfg-options model.backbone.init_cfg.prefix=backbone.']
