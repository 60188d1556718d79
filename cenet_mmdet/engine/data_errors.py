"""Errors of data sets that cannot be built, in words that name the file and the fix."""
import os
from contextlib import contextmanager
from typing import Any, Iterator, List

from mmengine.config import Config

from ..utils.errors import InputError
from .annotations import AnnotationFile
from .data_check_hook import leaves, refuse


@contextmanager
def explain_data_errors(cfg: Config) -> Iterator[None]:
    """Turn an error inside into an InputError, if it comes from missing or unfit data of `cfg`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError):
        refuse(data_problems(cfg))
        raise


def data_problems(cfg: Config) -> List[str]:
    """What of the config's data is not there, or lacks what data sets need; a text for each."""
    problems = []
    for split in ('train', 'val', 'test'):
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        problems += [f'{split}_dataloader: {problem}' for leaf in leaves(dataset)
                     for problem in _dataset_problems(leaf, cfg)]
        evaluator = cfg.get(f'{split}_evaluator') or []
        if isinstance(evaluator, dict):
            evaluator = evaluator.get('metrics', [evaluator])
        paths = [metric.get('ann_file') for metric in evaluator if isinstance(metric, dict)]
        problems += [f'{split}_evaluator: {problem}' for problem in _not_found(paths, cfg)]
    return list(dict.fromkeys(problems))


def _dataset_problems(dataset: Any, cfg: Config) -> Iterator[str]:
    root, ann_file = (dataset.get(name) or '' for name in ('data_root', 'ann_file'))
    prefixes = dataset.get('data_prefix') or {}
    folders = [prefixes] if isinstance(prefixes, str) else prefixes.values()
    paths = [os.path.join(root, path) for path in (ann_file, *folders)]
    if root and '://' not in root and not os.path.isdir(root):
        paths = [paths[0] if ann_file else root]
    missing = list(_not_found(paths, cfg))
    yield from missing
    if not missing and os.path.isfile(paths[0]) and ann_file.endswith('.json'):
        problems = AnnotationFile(paths[0]).build_problems(
            (dataset.get('metainfo') or {}).get('classes'))
        yield from (f'{paths[0]}: {problem}.' for problem in problems)


def _not_found(paths: List[str], cfg: Config) -> Iterator[str]:
    for path in paths:
        if path and '://' not in path and not os.path.exists(path):
            variables = [f'{name} (now {value!r})' for name, value in cfg.env_variables.items()
                         if value and value in path]
            fix = f'set {" or ".join(variables)}' if variables else 'correct the path in the config'
            yield f'{path} is not there. Put it there, or {fix}.'
