"""The shipped configs: find one, list them, copy one with those it is based on."""
import ast
import difflib
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Dict, List

from ..utils.resources import configs_dir, tools_dir

# folder -> what is in it, in the order of the list
GROUPS = {
    '.': 'Mask R-CNN on COCO',
    'demo': 'Small, on generated data',
    'imagenet': 'Classifiers on ImageNet, with mmpretrain',
    'cifar10': 'Classifiers on CIFAR-10, with mmpretrain',
}


def run_list(arguments) -> int:
    """Print each config's name and the first sentence of its comment, by folder."""
    configs = shipped_configs()
    width = max(map(len, configs)) + 2
    folders = sorted({path.parent for path in configs.values()},
                     key=lambda folder: [*GROUPS, _name(folder)].index(_name(folder)))
    for folder in folders:
        print(GROUPS.get(_name(folder), _name(folder)))
        for name, path in configs.items():
            if path.parent == folder:
                print(f'  {name:{width}}{description(path)}')
        print()
    print('Copy one to change it: cenet-mmdet configs copy NAME')
    return 0


def run_copy(arguments) -> int:
    """Copy a config and its bases; print what was written and the next command."""
    source = _shipped_config(arguments.name)
    copies = {path: arguments.to / path.relative_to(configs_dir())
              for path in with_bases(source)}
    _check_targets(copies)
    written = _copy(copies)
    for path in copies.values():
        print(f'{"wrote" if path in written else "is there already:"} {path}')
    config = shlex.quote(str(copies[source]))
    print(f'\nNext, see whether it can be trained here, and train it:\n'
          f'    cenet-mmdet doctor --config {config}\n'
          f'    python {shlex.quote(_short(tools_dir() / "train.py"))} {config}')
    return 0


def shipped_configs() -> Dict[str, Path]:
    """Path of each config by its name, which is its place in the folder of configs."""
    paths = (path for path in configs_dir().rglob('*.py')
             if '_base_' not in path.relative_to(configs_dir()).parts)
    configs = {path.relative_to(configs_dir()).as_posix(): path for path in sorted(paths)}
    if not configs:
        sys.exit(f'no configs in {configs_dir()}. Install cenet-mmdet again.')
    return configs


def find_config(name_or_path: str) -> Path:
    """A config file that is there, or else a shipped one; an exit that names the nearest."""
    path = Path(name_or_path)
    return path if path.is_file() else _shipped_config(name_or_path)


def _shipped_config(name: str) -> Path:
    configs = shipped_configs()
    found = configs.get(name) or configs.get(f'{name}.py')
    if found is None:
        stem = Path(name).name.replace('.py', '')
        same = [other for other in configs if Path(other).stem == stem]
        near = same or difflib.get_close_matches(f'{name.replace(".py", "")}.py', configs)
        hint = f'Did you mean {" or ".join(near)}? ' if near else ''
        sys.exit(f'config not found: {name}. {hint}`cenet-mmdet configs list` shows those there '
                 'are.')
    return found


def description(path: Path) -> str:
    """The first sentence of the comment that a config begins with, without its period."""
    lines = []
    for line in path.read_text(encoding='utf-8').splitlines():
        if not re.match(r'# ?\S', line):  # the end, or an indented example
            break
        lines.append(line[1:].strip())
    return re.split(r'\.(?:\s|$)', ' '.join(lines))[0]


def with_bases(path: Path) -> List[Path]:
    """The config and the files that it is based on, directly or not; no library's (`mmdet::`)."""
    found = [path]
    for config in found:  # grows
        for base in _bases(config):
            file = (config.parent / base).resolve()
            found += [file] * (file.is_file() and file not in found)
    return found


def _bases(path: Path) -> List[str]:
    """What the `_base_` of a config in Python says."""
    if path.suffix != '.py':
        return []
    for statement in ast.parse(path.read_text(encoding='utf-8'), str(path)).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == '_base_':
            strings = ast.walk(statement.value)
            return [node.value for node in strings if isinstance(node, ast.Constant)]
    return []


def _check_targets(copies: Dict[Path, Path]) -> None:
    """Exit if a file to be written is there and is another one."""
    for source, target in copies.items():
        if target.is_dir() or (target.is_file() and target.read_bytes() != source.read_bytes()):
            sys.exit(f'{target} is there and is not the shipped file; nothing was written. Give '
                     'another folder with --to, or move that file away.')


def _copy(copies: Dict[Path, Path]) -> List[Path]:
    """Write the files that are not there yet: all of them or, on an error, none."""
    missing = {source: target for source, target in copies.items() if not target.exists()}
    try:
        for source, target in missing.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        for target in missing.values():
            if target.is_file():
                target.unlink()
        sys.exit(f'cannot write {error.filename}: {error.strerror}; nothing was written. Give '
                 'another folder with --to.')
    return list(missing.values())


def _name(folder: Path) -> str:
    return folder.relative_to(configs_dir()).as_posix()


def _short(path: Path) -> str:
    """The path from the working directory where it is below, else the whole one."""
    here = Path.cwd()
    return str(path.relative_to(here) if here in path.parents else path)
