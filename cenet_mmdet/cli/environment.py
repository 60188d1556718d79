"""What is installed, under which names, and whether it can be imported."""
import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

# import name -> the distributions that provide it
PROVIDERS = {
    'torch': ('torch', ),
    'torchvision': ('torchvision', ),
    'numpy': ('numpy', ),
    'cv2': ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python',
            'opencv-contrib-python-headless'),
    'pycocotools': ('pycocotools', ),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpose': ('mmpose', 'onedl-mmpose'),
    'mmdet3d': ('mmdet3d', 'onedl-mmdetection3d'),
    'mmrotate': ('mmrotate', 'onedl-mmrotate'),
    'mmaction': ('mmaction2', 'onedl-mmaction2'),
    'mmocr': ('mmocr', 'onedl-mmocr'),
    'mmyolo': ('mmyolo', 'onedl-mmyolo'),
}
REQUIRED = ('torch', 'numpy', 'cv2', 'pycocotools', 'mmengine', 'mmcv', 'mmdet')
OPENMMLAB = tuple(name for name in PROVIDERS if name.startswith('mm'))

# What is imported to see whether a library works; the library itself unless it is here.
# mmpretrain is imported by this package, which does without its torchvision.
PROBES = {'pycocotools': 'pycocotools.mask', 'mmdet': 'mmdet.models',
          'mmpretrain': 'cenet_mmdet.models.mmpretrain'}

# The last line of stderr is the error.
IN_A_NEW_PROCESS = '''
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[2])
importlib.import_module(sys.argv[1])
'''


class Library(NamedTuple):
    """A library that is installed; `error` says why it cannot be imported, '' if it can."""
    name: str
    distributions: Tuple[Distribution, ...]
    folder: Optional[Path]  # what `import` would take
    error: str

    @property
    def version(self) -> str:
        """As the distribution has it; '' for a folder without one."""
        return self.distributions[0].version if self.distributions else ''

    @property
    def providers(self) -> List[str]:
        return [found.metadata['Name'] for found in self.distributions]

    @property
    def shadow(self) -> str:
        """The folder that is imported instead of the distribution's own; '' if none is."""
        if not self.distributions or self.folder is None or self._is_editable():
            return ''
        own = [Path(str(found.locate_file(self.name))).resolve() for found in self.distributions]
        return '' if self.folder.resolve() in own else str(self.folder)

    def _is_editable(self) -> bool:
        return any('"editable": true' in (found.read_text('direct_url.json') or '')
                   for found in self.distributions)


def libraries() -> Dict[str, Library]:
    """The installed ones by import name; those that do not work included."""
    found = {}
    for name, providers in PROVIDERS.items():
        distributions = tuple(filter(None, map(_distribution, providers)))
        spec = find_spec(name)
        if distributions or (spec and spec.origin):  # else a folder of that name
            folder = Path(spec.origin).parent if spec and spec.origin else None
            found[name] = Library(name, distributions, folder,
                                  import_error(PROBES.get(name, name)))
    return found


def _distribution(name: str) -> Optional[Distribution]:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def import_error(module: str) -> str:
    """The exception that importing the module ends in, in one line; '' if it is imported."""
    try:
        importlib.import_module(module)
        return ''
    except KeyError:
        # An earlier attempt may have got as far as to register classes, which this one then
        # cannot do: the first error is the one to be told.
        answer = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', IN_A_NEW_PROCESS, module, json.dumps(sys.path)],
            capture_output=True, text=True)
        lines = answer.stderr.strip().splitlines()
        return lines[-1] if lines else 'it works alone, but not after cenet_mmdet'
    except Exception as error:
        return one_line(error)


def one_line(error: Exception) -> str:
    """Type and first line of an exception; some have a whole page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0] if lines else ""}'


def release(version: str) -> Tuple[int, ...]:
    """(2, 1, 0) of '2.1.0rc1+cu118': what counts when versions are compared."""
    return tuple(int(part) for part in re.match(r'[\d.]*', version).group().split('.') if part)


def version_limits(library: Library) -> Dict[str, Tuple[str, str]]:
    """mmcv and mmengine -> the least version that a library takes and the first it does not.

    Read from its source, for importing it raises where they are not met.
    """
    source = library.folder / '__init__.py' if library.folder else None
    if source is None or not source.is_file():
        return {}
    found = re.findall(r'''^(mmcv|mmengine)_(min|max)(?:imum)?(?:_version)?\s*=\s*['"](.+?)['"]''',
                       source.read_text(encoding='utf-8'), re.MULTILINE | re.IGNORECASE)
    limits = {(name.lower(), end.lower()): version for name, end, version in found}
    return {name: (limits.get((name, 'min'), '0'), limits.get((name, 'max'), ''))
            for name in ('mmcv', 'mmengine') if {(name, 'min'), (name, 'max')} & set(limits)}
