"""Errors of data sets that cannot be built, in words that name the file and the fix."""
import os
from contextlib import contextmanager
from typing import Dict, Iterator, List

from mmengine.config import Config

from ..utils.errors import InputError
from .annotations import AnnotationFile


@contextmanager
def explain_data_errors(cfg: Config) -> Iterator[None]:
    """Turn an error inside into an InputError, if it comes from missing or unfit data.

    Args:
        cfg: the config whose data sets are built inside.
    """
    try:
        yield
    except (OSError, KeyError, RuntimeError) as error:
        problems = data_problems(cfg)
        if not problems:
            raise
        raise InputError('\n'.join(f'- {problem}' for problem in problems)) from error


def data_problems(cfg: Config) -> List[str]:
    """What of the config's data is not there, or lacks what data sets need; a text for each."""
    problems: Dict[str, None] = {}
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader') or {}
        for dataset in _leaves(loader.get('dataset') or {}):
            for problem in _dataset_problems(dataset, cfg):
                problems[f'{split}_dataloader: {problem}'] = None
        for metric in _metrics(cfg.get(f'{split}_evaluator')):
            path = metric.get('ann_file') or ''
            if '://' not in path and path and not os.path.exists(path):
                problems[f'{split}_evaluator: {_not_found(path, cfg)}'] = None
    return list(problems)


def _dataset_problems(dataset: Dict, cfg: Config) -> Iterator[str]:
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or {}
    prefixes = [prefix] if isinstance(prefix, str) else list(prefix.values())
    ann_file = os.path.join(root, dataset.get('ann_file') or '')
    paths = [ann_file, *(os.path.join(root, folder) for folder in prefixes)]
    if root and '://' not in root and not os.path.isdir(root):
        paths = [ann_file if dataset.get('ann_file') else root]
    missing = [path for path in paths if path and '://' not in path and not os.path.exists(path)]
    yield from (_not_found(path, cfg) for path in missing)
    if not missing and os.path.isfile(ann_file) and ann_file.endswith('.json'):
        file = AnnotationFile(ann_file)
        classes = (dataset.get('metainfo') or {}).get('classes') or [
            category['name'] for category in file.categories]
        yield from (f'{ann_file}: {problem}.' for problem in file.build_problems(classes))


def _not_found(path: str, cfg: Config) -> str:
    variables = [f'{name} (now {value!r})' for name, value in cfg.env_variables.items()
                 if value and value in path]
    fix = f'set {" or ".join(variables)}' if variables else 'correct the path in the config'
    return f'{path} is not there. Put it there, or {fix}.'


def _leaves(dataset: Dict) -> Iterator[Dict]:
    """The configs of data sets inside wrappers."""
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    for wrapped in inner:
        if isinstance(wrapped, dict):
            yield from _leaves(wrapped)
    if inner == [None]:
        yield dataset


def _metrics(evaluator) -> List[Dict]:
    if isinstance(evaluator, dict):
        evaluator = evaluator.get('metrics', [evaluator])
    return [metric for metric in evaluator or () if isinstance(metric, dict)]
