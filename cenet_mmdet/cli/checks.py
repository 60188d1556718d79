"""What may be wrong with an environment, one function for each kind of trouble."""
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence

from .environment import OPENMMLAB, Library, one_line, release, version_limits
from .pairings import (
    LEGACY,
    Commands,
    Line,
    build_mmcv,
    fit_numpy,
    fix_import,
    install,
    move,
    remove,
    upgrade,
)

LAYERS = ('CE', 'SyncCE', 'CEBN', 'CESyncBN', 'CEGN', 'CEIN', 'IterNorm', 'DBN', 'CEResNet',
          'CEMobileNetV2')
WITH_MMPRETRAIN = ('CEShuffleNetV2', 'CEVGG')


class Problem(NamedTuple):
    """What is wrong, and the commands against it; one that is not `serious` stops no training."""
    text: str
    fix: Commands = ()
    serious: bool = True


class Environment(NamedTuple):
    """What the checks look at.

    Attributes:
        installed: the libraries that are there, by import name.
        required: names of those without which there is no training.
        line: whose versions the commands install.
        operators: device -> why mmcv's operators fail there, '' if they run.
        registries: library -> which layers and backbones its registry does not find.
    """
    installed: Dict[str, Library]
    required: Sequence[str]
    line: Line
    operators: Dict[str, str]
    registries: Dict[str, List[str]]

    def works(self, name: str) -> bool:
        return name in self.installed and not self.installed[name].error

    def version(self, name: str) -> str:
        return self.installed[name].version if name in self.installed else ''


def problems_of(env: Environment) -> List[Problem]:
    """All that is wrong with an environment; causes before what follows from them."""
    checks = (missing, duplicates, shadows, outside_limits, failing_imports, old_torch_new_numpy,
              no_pkg_resources, old_mmengine_new_torch, failing_operators)
    found = [problem for check in checks for problem in check(env)]
    if not any(problem.serious for problem in found):
        found += unregistered(env)  # else what is wrong above explains it
    return found


def missing(env: Environment) -> Iterator[Problem]:
    for name in env.required:
        if name not in env.installed:
            yield Problem(f'{name} is not installed', install(name, env.line, env.installed))


def duplicates(env: Environment) -> Iterator[Problem]:
    """Distributions that share a folder overwrite each other's files."""
    for name, library in env.installed.items():
        names = [f'{found.metadata["Name"]} {found.version}' for found in library.distributions]
        versions = {found.version for found in library.distributions}
        if len(names) > 1 and (name in OPENMMLAB or len(versions) > 1):
            yield Problem(f'{name} comes from {" and ".join(names)}, which overwrite each other',
                          (*remove(library.providers), *install(name, env.line, {})),
                          serious=name in OPENMMLAB and name in env.required)


def shadows(env: Environment) -> Iterator[Problem]:
    for name, library in env.installed.items():
        if library.shadow:
            yield Problem(f'{name} is imported from {library.shadow}, not from where '
                          f'{library.providers[0]} {library.version} is installed',
                          _out_of_the_shadow(library),
                          serious=bool(library.error) and name in env.required)


def _out_of_the_shadow(library: Library) -> Commands:
    here = Path(library.shadow).resolve().parent == Path.cwd()
    return ('cd ..', ) if here else ('unset PYTHONPATH', )


def outside_limits(env: Environment) -> Iterator[Problem]:
    """Versions that another library's own check would refuse."""
    for name, library in env.installed.items():
        for other, (least, below) in version_limits(library).items():
            version = env.version(other)
            if version and not _within(version, least, below):
                names = [other, *([name] if name in env.line.versions else [])]
                yield Problem(f'{name} {library.version} takes {other} >={least}'
                              f'{f", <{below}" if below else ""}, and {version} is installed',
                              move(names, env.line, env.installed) or upgrade(library),
                              serious=name in env.required)


def _within(version: str, least: str, below: str) -> bool:
    return release(least) <= release(version) and (not below or release(version) < release(below))


def failing_imports(env: Environment) -> Iterator[Problem]:
    """Each error once, with all libraries that end in it."""
    told = {library.name for library in env.installed.values()
            for other, limits in version_limits(library).items()
            if env.version(other) and not _within(env.version(other), *limits)}
    by_error = {}
    for name, library in env.installed.items():
        if library.error:
            by_error.setdefault(library.error, []).append(name)
    for error, names in by_error.items():
        library = env.installed[names[0]]
        if not (error.startswith('AssertionError') and told & set(names)):
            yield Problem(f'{", ".join(names)} cannot be imported: {error}',
                          _out_of_the_shadow(library) if library.shadow
                          else fix_import(library, env.line, env.installed),
                          serious=bool(set(names) & set(env.required)))


def old_torch_new_numpy(env: Environment) -> Iterator[Problem]:
    if not env.works('torch') or not env.works('numpy') or release(env.version('numpy')) < (2, ):
        return
    import torch
    fix = fit_numpy(LEGACY, env.installed)
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        yield Problem(f'torch {torch.__version__} was built for numpy 1 and cannot exchange arrays '
                      f'with numpy {env.version("numpy")} ({error})', fix)
    else:
        if env.line is LEGACY:
            yield Problem(f'numpy {env.version("numpy")}: the legacy line was written for numpy 1',
                          fix, serious=False)


def no_pkg_resources(env: Environment) -> Iterator[Problem]:
    folder = env.installed['mmengine'].folder if 'mmengine' in env.installed else None
    source = folder / 'utils' / 'package_utils.py' if folder else None
    needed = source and source.is_file() and 'import pkg_resources' in source.read_text('utf-8')
    if needed and not find_spec('pkg_resources'):
        yield Problem(f'mmengine {env.version("mmengine")} finds configs with pkg_resources, '
                      'which setuptools has no longer from version 81 on',
                      install('pkg_resources', env.line, env.installed))


def old_mmengine_new_torch(env: Environment) -> Iterator[Problem]:
    if 'torch' in env.installed and 'mmengine' in env.installed:
        legacy = env.installed['mmengine'].providers == ['mmengine']
        if legacy and release(env.version('torch')) >= (2, 6):
            yield Problem(f'mmengine {env.version("mmengine")} cannot load the checkpoints of runs '
                          f'(--resume, testing) with torch {env.version("torch")}, which from 2.6 '
                          'on refuses the objects in them',
                          move(['mmengine'], env.line, env.installed), serious=False)


def failing_operators(env: Environment) -> Iterator[Problem]:
    for device, error in env.operators.items():
        if error and device == 'cpu':
            lite = 'mmcv-lite' in env.installed['mmcv'].providers
            yield Problem(f"mmcv's operators do not run: {error}"
                          f'{" (mmcv-lite has none)" if lite else ""}',
                          install('mmcv', env.line, env.installed))
        elif error:
            yield Problem(f"mmcv's operators do not run on the GPU: {error}. Compiling them takes "
                          'the nvcc of the CUDA that torch was built for on the PATH',
                          build_mmcv(env.line))


def unregistered(env: Environment) -> Iterator[Problem]:
    for library, names in env.registries.items():
        if names:
            yield Problem(f'{library} does not find {", ".join(names)}; the command shows why',
                          ('python -W error -c "import cenet_mmdet"', ),
                          serious=library in env.required)


def run_operators() -> Dict[str, str]:
    """Run nms on each device that there is; the error by device, '' where it is right."""
    import torch

    return {device: _error_of_nms(device)
            for device in ['cpu'] + ['cuda'] * torch.cuda.is_available()}


def _error_of_nms(device: str) -> str:
    import torch
    try:
        importlib.import_module('mmcv._ext')
        from mmcv.ops import nms
        boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 30., 30.]])
        scores = torch.tensor([.9, .8, .7])
        kept = nms(boxes.to(device), scores.to(device), .5)[1].tolist()
    except Exception as error:
        return one_line(error)
    return '' if kept == [0, 2] else f'nms keeps boxes {kept} of three instead of [0, 2]'


def look_up(installed: Dict[str, Library]) -> Dict[str, List[str]]:
    """By library, which of this package's layers and backbones its registry does not find."""
    names = LAYERS + (WITH_MMPRETRAIN if _works('mmpretrain', installed) else ())
    return {library: _not_found(library, names) for library in OPENMMLAB
            if library != 'mmcv' and _works(library, installed)}


def _works(name: str, installed: Dict[str, Library]) -> bool:
    return name in installed and not installed[name].error


def _not_found(library: str, names: Sequence[str]) -> List[str]:
    try:
        models = importlib.import_module(f'{library}.registry').MODELS
        return [name for name in names
                if not getattr(models.get(name), '__module__', '').startswith('cenet_mmdet')]
    except Exception:  # a registry imports the library's models when it is first asked
        return list(names)
