"""Checks whether a config can be trained here."""
import contextlib
import importlib
import io
import re
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict

from ..utils.errors import first_line
from ..utils.stacks import STACKS
from .configs import shipped_config
from .fixes import Installed, differing, fix, nearest_stack

# library -> names of the distributions that provide it
DISTRIBUTIONS = {
    'torch': 'torch', 'torchvision': 'torchvision', 'numpy': 'numpy',
    'cv2': 'opencv(-contrib)?-python(-headless)?', 'pycocotools': 'pycocotools',
    'mmengine': '(onedl-)?mmengine(-lite)?', 'mmcv': '(onedl-)?mmcv(-lite|-full)?',
    'mmdet': 'mmdet|onedl-mmdetection', 'mmpretrain': '(onedl-)?mmpretrain'}
OPTIONAL = {'torchvision', 'mmpretrain'}
# library -> what is imported, where it is another module
MODULES = {'pycocotools': 'pycocotools.mask', 'mmdet': 'mmdet.models',
           'mmpretrain': 'cenet_mmdet.models.mmpretrain'}
LAYERS = ('CE', 'SyncCE', 'CEBN', 'CESyncBN', 'CEGN', 'CEIN', 'IterNorm', 'DBN', 'CEResNet',
          'CEMobileNetV2')


def run(arguments: Namespace) -> int:
    """Check whether a config can be trained here, and show how to fix known problems.

    Nothing is changed. The exit status is 0 if training can start, else 1.

        COCO_ROOT=/data/coco cenet-mmdet doctor --config mask_rcnn_syncce_r50.py
    """
    path = Path(arguments.config)
    config = path if path.is_file() else shipped_config(arguments.config)
    print(f'python {sys.version.split()[0]}, {sys.executable}', flush=True)
    versions = {str(found.metadata['Name']): found.version for found in distributions()}
    installed = {library: {name: versions[name] for name in versions if re.fullmatch(names, name)}
                 for library, names in DISTRIBUTIONS.items()}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        errors = _run_checks(installed, config)
    for check, error in errors.items():
        found = ', '.join(map(' '.join, installed.get(check, {}).items()))
        print(f'{check:20}{"fails" if error else "ok":7}{found}')
    if not errors['torch']:
        print(f'GPUs that torch finds: {importlib.import_module("torch").cuda.device_count()}')
    name = nearest_stack(installed)
    differ = [text for library in installed for text in differing(library, STACKS[name], installed)]
    print(f'versions that differ from the tested {name} stack: {", ".join(differ)}' if differ
          else f'versions: as in the tested {name} stack')
    for error in dict.fromkeys(filter(None, errors.values())):
        checks = [check for check in errors if errors[check] == error]
        print(f'\n- {", ".join(checks)}{" (optional)" * OPTIONAL.issuperset(checks)}: {error}',
              *fix(checks[0], error, STACKS[name], installed), sep='\n      ')
    fails = any(errors[check] for check in errors.keys() - OPTIONAL)
    print(f'\nVerdict: {config.name} {"cannot" if fails else "can"} be trained here.')
    return int(fails)


def _run_checks(installed: Installed, config: Path) -> Dict[str, str]:
    """Check -> its error, which may be the one of a library that it needs; '' if there is none."""
    errors = {library: _import_error(MODULES.get(library, library)) for library in DISTRIBUTIONS
              if library not in OPTIONAL or find_spec(library)}
    for library, found in installed.items():
        if library.startswith('mm') and len(found) > 1:
            errors[library] = f'{" and ".join(found)} overwrite each other'
    errors['mmcv operators'] = errors['torch'] or errors['mmcv'] or _error(_run_operators)
    errors['registered layers'] = errors['mmdet'] or _error(_find_layers)
    errors['config and files'] = errors['mmdet'] or _error(_find_files, config)
    return errors


def _import_error(module: str) -> str:
    if module in sys.modules:
        return ''
    # A second attempt in this process could end in another error than that of `cenet_mmdet`.
    code = f'import sys; sys.path[:] = {sys.path}; import {module}'
    child = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    return (child.stderr.strip() or 'crash').splitlines()[-1] if child.returncode else ''


def _error(check: Callable, *arguments: Path) -> str:
    try:
        return check(*arguments) or ''
    except Exception as error:
        return f'{type(error).__name__}: {first_line(error)}'


def _run_operators() -> None:
    import torch
    torch.zeros(1).numpy()
    from mmcv.ops import nms
    boxes, scores = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.]]), torch.tensor([.9, .8])
    for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
        nms(boxes.to(device), scores.to(device), .5)


def _find_layers() -> str:
    registries = map(importlib.import_module, ('mmengine.registry', 'mmdet.registry'))
    return ', '.join(f'{registry.__name__} does not find {name}' for registry in registries
                     for name in LAYERS if registry.MODELS.get(name) is None)


def _find_files(config: Path) -> str:
    from ..engine.job import job_problems
    from ..models.build import load_config
    return '\n  '.join(job_problems(load_config(config)))
