"""Finds missing and damaged files before a run starts, and says how to supply them."""
from pathlib import Path
from typing import Iterator, List, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from ..checkpoint.load import CAN_ALLOW, CheckpointError, UnsafeCheckpointError, load
from ..models.backbones.ce_network import CENetwork
from ..utils.errors import InputError

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


def check_files(cfg: Config, splits: Sequence[str], weights: bool = True) -> None:
    """Raises an InputError with a line for each problem of `missing_files`."""
    problems = missing_files(cfg, splits, weights)
    if problems:
        raise InputError('\n'.join(problems))


def missing_files(cfg: Config, splits: Sequence[str], weights: bool = True) -> List[str]:
    """One line for each file or folder that the run needs and that is missing or damaged.

    Covers the annotations and images of the data sets, `load_from` or the
    checkpoint to resume from, and, when training, pretrained weights. Files
    with a scheme (`torchvision://`, `s3://`) are left to MMEngine.

    Args:
        cfg: an MMEngine config, with its `work_dir` where `resume` is set.
        splits: which of train, val and test the run uses.
        weights: whether to look at the weights that training starts from.
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
    if weights and 'train' in splits:
        for checkpoint in _pretrained(cfg.model):
            problems += _unreadable('pretrained weights', checkpoint, WEIGHTS_FIX)
        if not problems:
            problems += _whole_model(cfg.model.get('backbone') or {})
    return list(dict.fromkeys(problems))


def _not_resumable(cfg: Config) -> List[str]:
    """What keeps a run from going on, from `load_from` or from its last checkpoint."""
    path = cfg.get('load_from')
    if not path:
        pointer = Path(cfg.work_dir) / 'last_checkpoint'
        if not pointer.is_file():
            return []  # nothing to resume: MMEngine says so and starts
        path = pointer.read_text().strip() or pointer
    problems = _unreadable('checkpoint', path, 'Resume from an intact one')
    if problems:
        others = sorted(Path(path).parent.glob('*.pth'), key=lambda file: -file.stat().st_mtime)
        intact = next((file for file in others if not _unreadable('', file, '')), None)
        return [problem + (f': --resume {intact}' if intact else '.') for problem in problems]
    if '://' not in str(path) and CAN_ALLOW:
        lacking = [key for key in RESUMABLE if key not in load(path)]
        if lacking:
            problems = [f'not a checkpoint that a run can be resumed from: {path} has no '
                        f'{", ".join(lacking)}. To start a new run from its weights, pass '
                        f'--cfg-options load_from={path} instead of --resume.']
    return problems


def _unreadable(what: str, path, fix: str) -> List[str]:
    problems = _missing(what, path, fix)
    if problems or '://' in str(path):
        return problems
    try:
        checkpoint = load(path)
    except UnsafeCheckpointError:
        return []  # MMEngine reads it, and trusts it
    except CheckpointError as error:
        return [f'{what}: {error} {fix}']
    if not isinstance(checkpoint, dict):
        return [f'{what} without weights: {path} holds no state dict. {fix}']
    return []


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


def _whole_model(backbone: dict) -> List[str]:
    """MMEngine would load nothing and only warn where a prefix is needed and not given."""
    init_cfg = backbone.get('init_cfg')
    if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        path = init_cfg.checkpoint
        kind = MODELS.get(backbone.type)
        if '://' in str(path) or init_cfg.get('prefix') or issubclass(kind, CENetwork):
            return []  # CE backbones find themselves in whole models
        checkpoint = load(path)
        entries = checkpoint.get('state_dict', checkpoint)
        if any(key.startswith('backbone.') for key in entries):
            return [f'{path} holds a whole model, in which {backbone.type} would find none of its '
                    'weights. Add --cfg-options model.backbone.init_cfg.prefix=backbone.']
    return []
