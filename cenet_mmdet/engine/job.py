"""What a run would find, without starting it."""
from typing import List

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, MODELS

from ..models.build import init_scope
from ..utils.errors import InputError
from .data_check_hook import dataset_problems, evaluator_problems, leaves
from .data_errors import explain_data_errors
from .weights import weight_problems


def job_problems(cfg: Config) -> List[str]:
    """What keeps a config from being trained, or lets it go wrong in silence; a text for each.

    Model, data sets and evaluator are built as the runner would, and looked at as `DataCheckHook`
    does.
    """
    init_scope(cfg)
    problems = weight_problems(MODELS.build(cfg.model), cfg)
    try:
        with explain_data_errors(cfg):
            problems += _data_problems(cfg)
    except InputError as error:
        problems += [line.lstrip('- ') for line in str(error).splitlines()]
    return list(dict.fromkeys(problems))


def _data_problems(cfg: Config) -> List[str]:
    problems = []
    for split in ('train', 'val'):
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        dataset = DATASETS.build(loader.dataset)
        metrics = Evaluator(cfg.val_evaluator).metrics if split == 'val' else []
        for leaf in leaves(dataset):
            problems += dataset_problems(f'{split}_dataloader', leaf)
            for metric in metrics:
                problems += evaluator_problems('val_evaluator', metric, leaf)
    return problems
