"""What one config needs: libraries, data and weights."""
import os
import re
from pathlib import Path
from typing import Dict, List, Sequence

from .checks import Problem
from .configs import with_bases
from .environment import PROVIDERS, REQUIRED, Library


def libraries_of(config: Path) -> Sequence[str]:
    """Import names of the libraries without which the config cannot be trained."""
    named = re.findall(r'''['"](\w+)::''', _text(config))
    return (*REQUIRED, *sorted({name for name in named if name in PROVIDERS} - set(REQUIRED)))


def missing_for(config: Path, installed: Dict[str, Library]) -> List[Problem]:
    """What of the config's data and weights is not where it looks, and how to say where it is.

    Raises:
        Exception: whatever MMEngine raises for a config that it cannot read.
    """
    from mmengine.config import Config

    from ..engine.preflight import missing_files

    cfg = Config.fromfile(str(config))
    places = variables(config)
    found = [Problem(text, _exports(text, places)) for text in missing_files(cfg, ('train', 'val'))]
    torchvision = installed.get('torchvision')
    for name, value in places.items():
        unused = not value.startswith('torchvision://') or value not in str(cfg.model)
        if not unused and (torchvision is None or torchvision.error):
            found.append(Problem(f'pretrained weights not available: {value} needs torchvision, '
                                 'which is not installed or does not work',
                                 (_export(name, value.split('//')[1] + '.pth'), )))
    return found


def variables(config: Path) -> Dict[str, str]:
    """Environment variables that a config and its bases read, with their values or defaults."""
    found = re.findall(r'\{\{\s*\$(\w+):(.*?)\s*\}\}', _text(config))
    return {name: os.environ.get(name, default) for name, default in found}


def _text(config: Path) -> str:
    return '\n'.join(path.read_text(encoding='utf-8') for path in with_bases(config))


def _exports(text: str, places: Dict[str, str]):
    """`export` lines for the variables that a missing path came from."""
    return tuple(_export(name, Path(value).name) for name, value in places.items() if value
                 and name.endswith(('_ROOT', '_CHECKPOINT')) and str(Path(value)) in text)


def _export(name: str, example: str) -> str:
    return f'export {name}=/path/to/{example}'
