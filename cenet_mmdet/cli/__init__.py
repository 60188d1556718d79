"""The command cenet-mmdet.

`doctor` has to run where torch or any other library is missing or broken, so the modules of this
package import nothing but the standard library at their top.
"""
import argparse
from pathlib import Path
from typing import Callable, List, Optional

from . import configs, doctor, info

DOCTOR = '''Check whether a config can be trained here: the libraries, how they fit together, the
operators of mmcv, the registries, the data and the weights. Nothing is changed. Each problem comes
with the command that mends it. The exit status is 0 if training can start and 1 if it cannot.

    cenet-mmdet doctor
    COCO_ROOT=/data/coco cenet-mmdet doctor --config mask_rcnn_syncce_r50.py
'''
COPY = '''Copy a config, and those it is based on, with their places relative to each other: its
_base_ goes on working. A file that is already there and differs is not replaced.

    cenet-mmdet configs copy mask_rcnn_ce_r50 --to my_configs
'''
INFO = '''Show the CE layers of a checkpoint: of this package, of the authors, of MMEngine's runs or
of mmpretrain. No code that the file may hold is run.

    cenet-mmdet info work_dirs/mask_rcnn_ce_r50/epoch_24.pth
'''


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; the exit status."""
    arguments = parser().parse_args(argv)
    return arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    """Each subcommand's `run` is a function of the arguments that returns the exit status."""
    top = argparse.ArgumentParser(
        prog='cenet-mmdet', description='Channel Equilibrium networks for MMDetection: what helps '
                                        'beside the tools for training and testing.')
    commands = top.add_subparsers(metavar='COMMAND', required=True)

    command = _add(commands, 'doctor', doctor.run, 'check whether a config can be trained here',
                   DOCTOR)
    command.add_argument('--config', default='mask_rcnn_ce_r50.py', metavar='NAME_OR_PATH',
                         help='the config to be trained, shipped or your own (%(default)s)')

    nested = commands.add_parser('configs', help='list or copy the shipped configs')
    nested = nested.add_subparsers(metavar='COMMAND', required=True)
    _add(nested, 'list', configs.run_list, 'list the shipped configs')
    command = _add(nested, 'copy', configs.run_copy, 'copy one, with those it is based on', COPY)
    command.add_argument('name', metavar='NAME',
                         help='as `configs list` has it; .py may be left out')
    command.add_argument('--to', type=Path, default=Path('configs'), metavar='FOLDER',
                         help='made if it is not there (%(default)s)')

    command = _add(commands, 'info', info.run, 'show the CE layers of a checkpoint', INFO)
    command.add_argument('checkpoint', metavar='CHECKPOINT', help='a file that torch.save wrote')
    return top


def _add(commands, name: str, run: Callable, summary: str, description: str = '') -> \
        argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=description or summary,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run)
    return command
