"""The commands that fix known breakages. None of them replaces an installed torch."""
import operator
import re
import shlex
import sys
from typing import Dict, List, Tuple

from ..utils.stacks import STACKS, Stack

Installed = Dict[str, Dict[str, str]]  # library -> distribution -> version


def nearest_stack(installed: Installed) -> str:
    """The name of the stack to install from; it depends on torch, which is not replaced."""
    old = any(_release(version) < (2, 2) for version in installed['torch'].values())
    return 'legacy' if old or sys.version_info < STACKS['maintained'].oldest else 'maintained'


def fix(check: str, error: str, stack: Stack, installed: Installed) -> List[str]:
    """Commands for the error that a check of `doctor` ends in; none if it is not a known one."""
    missing = re.search(r"(?:No module named '|ModuleNotFoundError: )(mm\w+|\w+(?='))", error)
    libraries = [missing[1]] if missing else [check] * ('overwrite each other' in error)
    if 'Numpy is not available' in error:  # torch was built for numpy 1
        return [_pip('install', STACKS['legacy'].numpy, *STACKS['legacy'].opencv)]
    if check == 'mmcv operators' or 'mmcv/_ext' in error:
        libraries = ['mmcv']
    elif error.startswith('AssertionError') and check in installed:
        # OpenMMLab's libraries assert versions. Duplicates have an error of their own.
        libraries = [library for library in dict.fromkeys(['mmengine', 'mmcv', check])
                     if differing(library, stack, installed) and len(installed[library]) == 1]
    elif check == 'torchvision' and not missing:  # it is made for another torch
        return [_pip('uninstall', '-y', check)]
    return [command for library in libraries for command in _install(library, stack, installed)]


def _install(library: str, stack: Stack, installed: Installed) -> List[str]:
    """Commands that install the stack's version of a library; none for an unknown library."""
    pin = _pin(library, stack)
    if not pin or not library.startswith('mm'):
        return [_pip('install', *dict.fromkeys([pin, stack.numpy]))] if pin else []
    commands = [_pip('uninstall', '-y', *installed[library])] if installed[library] else []
    if library != 'mmcv':
        return [*commands, _pip('install', '--no-build-isolation', pin, stack.numpy)]
    # pip's isolated build has no torch and leaves the operators out. A wheel from an index or
    # from pip's cache may be made for another torch.
    options = ['--no-build-isolation', '--no-cache-dir', '--no-deps', '--no-binary']
    return [*commands, _pip('install', *stack.basics),
            '# The next command compiles for 10 to 30 minutes; for GPUs it needs nvcc.',
            f'MMCV_WITH_OPS=1 {_pip("install", *options, pin.split("==")[0], pin)}']


def differing(library: str, stack: Stack, installed: Installed) -> List[str]:
    """The installed distributions of a library that do not have the stack's version."""
    compare = {'==': operator.eq, '>=': operator.ge, '<': operator.lt}
    limits = re.findall(r'(==|>=|<)([\d.]+)', _pin(library, stack))
    return [f'{name} {version}' for name, version in installed[library].items()
            if not all(compare[sign](_release(version), _release(limit)) for sign, limit in limits)]


def _pin(library: str, stack: Stack) -> str:
    pins = {'cv2': stack.opencv[0], 'pkg_resources': stack.setuptools, 'pycocotools': 'pycocotools'}
    return {**stack._asdict(), **pins}.get(library, '')


def _release(version: str) -> Tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', version.partition('+')[0])))


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, '-m', 'pip', *arguments])
