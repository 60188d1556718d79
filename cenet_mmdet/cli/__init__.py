"""The command cenet-mmdet. It starts without torch, which no module imports at its top."""
import argparse
import inspect
from pathlib import Path
from typing import Any, Callable, List, Optional

from ..utils.errors import exit_on_input_error
from . import configs, doctor, info

__all__ = ['main', 'parser']


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return the exit status."""
    arguments = parser().parse_args(argv)
    with exit_on_input_error():
        return arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    """The parser; `run` of its result takes the arguments and returns the exit status."""
    top = argparse.ArgumentParser(prog='cenet-mmdet', description='CE networks for MMDetection.')
    commands = top.add_subparsers(metavar='COMMAND', required=True)
    command = _add(commands, 'doctor', doctor.run, 'check whether a config can be trained here')
    command.add_argument('--config', default='mask_rcnn_ce_r50.py', metavar='NAME_OR_PATH',
                         help='name of a shipped config, or path of a config (%(default)s)')
    command = _add(commands, 'info', info.run, 'show the CE layers of a checkpoint')
    command.add_argument('checkpoint', metavar='CHECKPOINT', help='path of a .pth file')
    group = commands.add_parser('configs', help='list or copy the shipped configs')
    commands = group.add_subparsers(metavar='COMMAND', required=True)
    _add(commands, 'list', configs.run_list, 'list the shipped configs')
    command = _add(commands, 'copy', configs.run_copy, 'copy a config and its base configs')
    command.add_argument('name', metavar='NAME', help='as shown by `list`; .py can be left out')
    command.add_argument('--to', type=Path, default=Path('configs'), metavar='FOLDER',
                         help='folder to copy to, created if needed (%(default)s)')
    return top


def _add(commands: Any, name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=inspect.getdoc(run),
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run)
    return command
