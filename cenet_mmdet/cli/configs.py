"""The shipped configs: list them, find one, copy one with its base configs."""
import re
import shutil
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import List

from ..utils.errors import InputError
from ..utils.files import replacing
from ..utils.resources import config_path, configs_dir


def run_list(_: Namespace) -> int:
    """List the shipped configs, each with the first sentence of its comment.
    The other commands take these names.

        cenet-mmdet configs list
    """
    for path in sorted(configs_dir().rglob('*.py')):
        name = path.relative_to(configs_dir()).as_posix()
        if '_base_' not in name:
            comment = re.match(r'(# ?\S.*\n)*', path.read_text(encoding='utf-8')).group()
            print(f'{name:44}' + re.split(r'\.\s', comment.replace('\n# ', ' '))[0][2:].strip())
    return 0


def run_copy(arguments: Namespace) -> int:
    """Copy a shipped config and its base configs into a folder, to edit them there.

    Either all files are written or none. A file that exists and differs is not replaced.

        cenet-mmdet configs copy mask_rcnn_ce_r50 --to my_configs
    """
    source = shipped_config(arguments.name)
    copies = {path: arguments.to / path.relative_to(configs_dir()) for path in _with_bases(source)}
    for path, target in copies.items():
        if target.is_dir() or (target.is_file() and target.read_bytes() != path.read_bytes()):
            raise InputError(f'{target} exists and is not the shipped file; nothing was written. '
                             'Give another folder with --to, or move that file away.')
    missing = {path: target for path, target in copies.items() if not target.exists()}
    try:
        with ExitStack() as stack:
            for path, target in missing.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, stack.enter_context(replacing(target)))
    except OSError as error:
        raise InputError(f'{error}; nothing was written. Give another folder with --to.') from error
    for path, target in copies.items():
        print(f'{"wrote" if path in missing else "already there:"} {target}')
    print(f'To check it: cenet-mmdet doctor --config {copies[source]}')
    return 0


def shipped_config(name: str) -> Path:
    """The path of a shipped config; its name may lack .py."""
    try:
        return Path(config_path(name if name.endswith('.py') else f'{name}.py'))
    except FileNotFoundError as error:
        raise InputError(f'config not found: {error}') from None


def _with_bases(path: Path) -> List[Path]:
    """The config and the shipped files that it inherits from, directly or not."""
    found = [path]
    for config in found:  # grows while it is read
        names = re.findall(r"'([\w./]+\.py)'", config.read_text(encoding='utf-8'))
        bases = ((config.parent / name).resolve() for name in names)
        found += [base for base in bases if base.is_file() and base not in found]
    return found
