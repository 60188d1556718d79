"""The versions that are known to work together, and the commands that lead to them."""
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from ..utils.stacks import STACKS
from .environment import Library, release

Commands = Tuple[str, ...]


class Line(NamedTuple):
    """Versions known to work together; requirements as pip takes them, by import name."""
    name: str
    torch: str
    requirements: Dict[str, str]
    beside: Dict[str, str]  # no newer or older ones next to them

    @property
    def versions(self) -> Dict[str, str]:
        return {name: pin.split('==')[1] for name, pin in self.requirements.items()}

    def __str__(self) -> str:
        pins = [f'torch=={self.torch}', *self.requirements.values(), self.beside['numpy'],
                self.beside['setuptools']]
        return f'{", ".join(pins).replace("==", " ")} ({self.name} line)'


def _line(name: str) -> Line:
    stack = STACKS[name]
    return Line(name, stack.torch.split('==')[1],
                {library: getattr(stack, library)
                 for library in ('mmengine', 'mmcv', 'mmdet', 'mmpretrain')},
                {'numpy': stack.numpy, 'cv2': stack.opencv[0], 'setuptools': stack.setuptools})


MAINTAINED, LEGACY = _line('maintained'), _line('legacy')

# import name -> what pip calls it, where the two differ
PACKAGES = {'yaml': 'pyyaml', 'PIL': 'pillow', 'skimage': 'scikit-image', 'git': 'gitpython',
            'importlib_metadata': 'importlib-metadata', 'mmseg': 'mmsegmentation',
            'mmaction': 'mmaction2'}


def line_of(installed: Dict[str, Library]) -> Line:
    """The line that an environment is on, or comes closest to; torch is what cannot be moved."""
    torch = release(installed['torch'].version) if 'torch' in installed else ()
    if torch and torch < (2, 2):
        return LEGACY
    if torch >= (2, 6):  # mmengine 0.10.7 cannot load its own runs' checkpoints there
        return MAINTAINED
    for name in ('mmdet', 'mmcv', 'mmengine'):
        if name in installed and installed[name].distributions:
            return MAINTAINED if 'onedl' in installed[name].providers[0] else LEGACY
    return MAINTAINED if sys.version_info >= (3, 10) else LEGACY


def departures(line: Line, installed: Dict[str, Library]) -> List[str]:
    """In what the installed libraries differ from the line's."""
    torch = line.torch if line is MAINTAINED else '2.1'  # any 2.1
    expected = {'torch': torch, **line.versions}
    found = [f'{name} {installed[name].version or "of unknown version"} instead of {version}'
             for name, version in expected.items() if name in installed
             and release(installed[name].version)[:len(release(version))] != release(version)]
    if line is LEGACY and 'numpy' in installed and release(installed['numpy'].version) >= (2, ):
        found.append(f'numpy {installed["numpy"].version} instead of <2')
    return found


def install(name: str, line: Line, installed: Dict[str, Library]) -> Commands:
    """Commands that install the line's version of a library, and leave torch alone."""
    wanted = line.requirements.get(name, '')
    others = [provider for provider in (installed[name].providers if name in installed else ())
              if name in line.requirements and provider != wanted.split('==')[0]]
    if name == 'mmcv':
        return (*remove(others), *build_mmcv(line, name in installed))
    if name == 'torch':
        return (_install(f'torch=={line.torch}', line.beside['numpy']), )
    if name == 'pkg_resources':
        return (_install(line.beside['setuptools']), )
    if name in line.beside:
        return (_install(*dict.fromkeys([line.beside[name], line.beside['numpy']])), )
    if name in line.requirements:
        beside = [line.beside['numpy']] if line is LEGACY else []
        return (*remove(others), _install('--no-build-isolation', wanted, *beside))
    return (_install(PACKAGES.get(name, name)), )


def remove(distributions: List[str]) -> Commands:
    """The command that removes the distributions, if there are any."""
    return (f'{pip("uninstall")} -y {" ".join(distributions)}', ) if distributions else ()


def move(names, line: Line, installed: Dict[str, Library]) -> Commands:
    """Commands for those of the libraries that are not at the line's version."""
    differ = [name for name in names if name not in line.versions or name not in installed
              or release(installed[name].version) != release(line.versions[name])]
    return tuple(command for name in differ for command in install(name, line, installed))


def reinstall(library: Library) -> Commands:
    """Commands that write a library's files again, at its present version."""
    release = library.version.split('+')[0]
    pins = [f'{provider}=={release}' for provider in library.providers[:1]]
    return (_install('--force-reinstall', '--no-deps', *(pins or [library.name])), )


def upgrade(library: Library) -> Commands:
    """The command for a newer version of a library that the lines know nothing of."""
    return (_install('--upgrade', '--no-deps', *(library.providers[:1] or [library.name])), )


def build_mmcv(line: Line, again: bool = True) -> Commands:
    """Commands that install mmcv with operators for the torch that is there, without touching it.

    Without build isolation: in pip's own build environment there is no torch, and mmcv comes out
    without operators. Without pip's cache, where such a build may lie; and `again`, where one was
    installed, without ready wheels, which are for another torch.
    """
    pin = line.requirements['mmcv']
    options = f' --force-reinstall --no-deps --no-binary {pin.split("==")[0]}' if again else ''
    return ('# compiles for 10 to 30 minutes, with a C++ compiler and, for GPUs, nvcc',
            _install(line.beside['setuptools'], 'wheel', 'ninja', 'psutil'),
            f'MMCV_WITH_OPS=1 {pip()} --no-build-isolation --no-cache-dir{options} {pin}')


def fit_numpy(line: Line, installed: Dict[str, Library]) -> Commands:
    """Commands for a numpy, and an OpenCV, that the line's libraries were built for."""
    opencv = installed['cv2'].providers if 'cv2' in installed else []
    limit = re.sub(r'^[\w-]+', '', line.beside['cv2'])
    return (_install(line.beside['numpy'], *(f'{provider}{limit}' for provider in opencv)), )


def fix_import(library: Library, line: Line, installed: Dict[str, Library]) -> Commands:
    """Commands against the error that a library's import ends in."""
    error = library.error
    if library.name == 'torchvision':
        return remove(library.providers)  # nothing here needs it
    missing = re.search(r"No module named '(\w+)", error)
    if missing and missing.group(1) != library.name:
        return install(missing.group(1), line, installed)
    if library.name == 'mmcv' or '_ext' in error:
        return install('mmcv', line, installed)
    if 'libGL' in error or 'libgthread' in error:
        headless = f'opencv-python-headless=={installed["cv2"].version}'
        return (*remove(installed['cv2'].providers), _install('--no-deps', headless))
    if re.search('numpy|_ARRAY_API|multiarray', error):
        return fit_numpy(line, installed)
    if library.name in line.requirements:
        names = ('mmengine', 'mmcv', library.name)
        return move(names, line, installed) or reinstall(library)
    return reinstall(library)


def _install(*arguments: str) -> str:
    return f'{pip()} {" ".join(map(shlex.quote, arguments))}'


def pip(command: str = 'install') -> str:
    """pip as one has to type it to reach this very environment."""
    found = shutil.which('pip')
    ours = found and Path(found).parent == Path(sys.executable).parent
    return f'{"pip" if ours else f"{shlex.quote(sys.executable)} -m pip"} {command}'
