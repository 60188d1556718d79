"""Command lines of MMEngine's runs, with the arguments of MMDetection's."""
import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..models.build import load_config


def run_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of a config file')
    parser.add_argument('--work-dir', metavar='FOLDER',
                        help='where logs and checkpoints go (work_dirs/NAME_OF_THE_CONFIG)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='change settings of the config, for example '
                             'train_dataloader.batch_size=4 or key="[a,b]"')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='what started this process as one of several (%(default)s)')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    return parser


def run_config(arguments: argparse.Namespace) -> Config:
    """The config that the arguments of a `run_parser` name."""
    os.environ.setdefault('LOCAL_RANK', str(arguments.local_rank))
    cfg = load_config(arguments.config, arguments.cfg_options)
    cfg.launcher = arguments.launcher
    if arguments.work_dir or not cfg.get('work_dir'):
        cfg.work_dir = arguments.work_dir or str(Path('work_dirs') / Path(arguments.config).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """MMEngine's Runner, or the one that `runner_type` names."""
    return RUNNERS.build(cfg) if cfg.get('runner_type') else Runner.from_cfg(cfg)
