"""What a run would find, without starting it."""
from typing import List

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, MODELS

from ..models.build import init_scope
from ..utils.errors import InputError
from .data_check_hook import split_problems
from .data_errors import explain_data_errors
from .weights import weight_problems


def job_problems(cfg: Config) -> List[str]:
    """What keeps a config from being trained, and what `DataCheckHook` finds; a text for each."""
    init_scope(cfg)
    problems = weight_problems(MODELS.build(cfg.model), cfg)
    try:
        with explain_data_errors(cfg):
            for split in ('train', 'val'):
                if cfg.get(f'{split}_dataloader'):
                    dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
                    metrics = Evaluator(cfg.val_evaluator).metrics if split == 'val' else ()
                    problems += split_problems(split, dataset, metrics)
    except InputError as error:
        problems += [line.lstrip('- ') for line in str(error).splitlines()]
    return list(dict.fromkeys(problems))
