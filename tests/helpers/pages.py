"""The examples of README.md and docs/: where they are, and what their commands would run."""
import argparse
import copy
import functools
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

import mmdet
from conftest import ROOT
from mmengine import registry as mmengine_registry
from mmengine.config import Config
from mmengine.runner import Runner

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim' / 'tools'
# Tools that hand their command line to MMDetection's tool of this name.
HANDED_ON = {'train.py': 'train.py', 'test.py': 'test.py',
             'browse_dataset.py': 'analysis_tools/browse_dataset.py'}
STANDINS = 'python', 'torchrun', 'srun', 'pip', 'make', 'cenet-mmdet'


class Block(NamedTuple):
    """A fenced example."""
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f'{self.page.name}:{self.line}'


def blocks(page: Path, language: str) -> List[Block]:
    """Fenced blocks of a page, in order."""
    text = page.read_text(encoding='utf-8')
    found = [Block(page, text[:match.start()].count('\n') + 1, match[1], match[2])
             for match in re.finditer(r'^```(\w*)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)]
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r'^```.*?^```$', '', page.read_text(encoding='utf-8'),
                  flags=re.MULTILINE | re.DOTALL)


def world(folder: Path) -> Path:
    """A folder that looks like the checkout, for commands to start from."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in ('cenet_mmdet', 'configs', 'docs', 'tools'):
            (folder / path.name).symlink_to(path)
    return folder


def commands(script: str, folder: Path) -> List[List[str]]:
    """What a bash script would run, by bash itself: stand-ins note their arguments down.

    The launchers are run for what they are, and the torchrun and srun they call noted down.
    """
    notes, bin_folder = folder / 'commands', folder / 'bin'
    bin_folder.mkdir(exist_ok=True)
    notes.write_text('')
    for name in STANDINS:
        standin = bin_folder / name
        standin.write_text('#!/bin/bash\n{ printf "%s\\x1f" "${0##*/}" "$@"; printf "\\x1e"; } '
                           f'>> {notes}\n')
        standin.chmod(0o755)
    result = subprocess.run(['bash', '-euo', 'pipefail', '-c', script], cwd=folder, text=True,
                            capture_output=True, env={'PATH': f'{bin_folder}:/usr/bin:/bin'})
    assert result.returncode == 0, f'{script}\n{result.stdout}{result.stderr}'
    return [part.split('\x1f')[:-1] for part in notes.read_text().split('\x1e')[:-1]]


class _Parsed(SystemExit):
    """Ends a tool, with its arguments."""


def arguments_of(command: List[str], folder: Path) -> argparse.Namespace:
    """What the tool's own parser makes of `tools/NAME.py ARGUMENTS...`.

    Raises:
        AssertionError: there is no such tool, or it does not take the arguments.
    """
    script, *argv = command
    path = folder / script
    assert path.is_file(), f'no such tool: {script}'
    if path.name in HANDED_ON:
        path = MMDET_TOOLS / HANDED_ON[path.name]
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise _Parsed(original(self, *args, **kwargs))

    saved_argv, saved_path, here = sys.argv, list(sys.path), Path.cwd()
    try:
        argparse.ArgumentParser.parse_args = parse_args
        sys.argv = [str(path), *argv]
        sys.path.insert(0, str(ROOT / 'tools'))
        os.chdir(folder)
        runpy.run_path(str(path), run_name='__main__')
    except _Parsed as parsed:
        return parsed.args[0]
    except SystemExit as error:
        raise AssertionError(f'{script} does not take {argv}: exit {error.code}') from None
    finally:
        argparse.ArgumentParser.parse_args = original
        sys.argv, sys.path[:] = saved_argv, saved_path
        os.chdir(here)
    raise AssertionError(f'{script} has no parser')


# Dicts whose keys are free, and keys that are taken out before the class sees them.
FREE = {'metainfo', 'custom_keys', 'paramwise_cfg', 'custom_imports'}
TAKEN_OUT = {'norm_cfg': {'requires_grad'},
             'optim_wrapper': {'optimizer', 'paramwise_cfg', 'constructor'}}
DEFAULT_TYPE = {'ce_cfg': 'CE'}


@functools.cache
def _read(path: str) -> Config:
    return Config.fromfile(path)


def config(path) -> Config:
    """A copy of the config, which takes long to read."""
    return copy.deepcopy(_read(str(path)))


def unknown_keys(before: Config, after: Config, keys: List[str]) -> List[str]:
    """Dotted keys that neither the config had nor what is built from it takes.

    Args:
        before, after: without and with the keys.
        keys: such as `model.backbone.ce_cfg.bd_ratio`.
    """
    before, after = before.to_dict(), after.to_dict()
    return [key for key in keys if not _is_known(before, after, key.split('.'))]


def _is_known(before, after, parts, name='') -> bool:
    if not parts or name in FREE:
        return True
    key = int(parts[0]) if isinstance(after, (list, tuple)) else parts[0]
    had = key < len(before) if isinstance(before, (list, tuple)) else key in before
    if not had and key not in _taken(after, name):
        return False
    return _is_known((before[key] if had else None) or {}, after[key], parts[1:], parts[0])


def _taken(node, name: str):
    """Names of the arguments that a config dict may have."""
    if isinstance(node, (list, tuple)):
        return range(len(node))
    if not name:
        return {*inspect.signature(Runner.__init__).parameters, *FREE}
    kind = node.get('type', DEFAULT_TYPE.get(name))
    if kind is None:
        return ()
    return {*_parameters(_find_class(kind)), *TAKEN_OUT.get(name, ()), 'type'}


def _find_class(kind: str) -> type:
    import mmdet.registry
    import mmpretrain.registry

    for module in (mmdet.registry, mmpretrain.registry, mmengine_registry):
        for table in vars(module).values():
            if isinstance(table, mmengine_registry.Registry) and table.get(kind):
                return table.get(kind)
    raise AssertionError(f'{kind} is in no registry')


def _parameters(kind: type):
    """Names that the class takes, also those that it passes on to the classes it derives from."""
    names = set()
    for owner in kind.__mro__:
        if '__init__' not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters
        names |= set(parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    if getattr(kind, 'norm_type', ''):  # CEGN and the like hand the rest to the norm
        names |= _parameters(_find_class(kind.norm_type))
    return names


def flat_keys(node: Dict, prefix='') -> List[str]:
    """Dotted keys of all leaves of nested dicts."""
    keys = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            keys += flat_keys(value, f'{prefix}{key}.')
        else:
            keys.append(f'{prefix}{key}')
    return keys
