"""Where the configs lie: beside the package in a checkout, inside it once installed."""
import difflib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def configs_dir() -> Path:
    """Folder of the shipped configs."""
    installed = PACKAGE / '.mim'  # where OpenMMLab's packages keep them
    return (installed if installed.is_dir() else PACKAGE.parent) / 'configs'


def config_path(name: str) -> str:
    """Absolute path of a shipped config.

    In a config that a tool of another package reads, it names the base:

        _base_ = __import__('cenet_mmdet').config_path('mask_rcnn_ce_r50.py')

    Raises:
        FileNotFoundError: there is no such config; the message has the nearest names.
    """
    folder = configs_dir()
    names = [path.relative_to(folder).as_posix() for path in folder.rglob('*.py')]
    if name not in names:
        nearest = ' or '.join(difflib.get_close_matches(name, names, n=4, cutoff=0))
        raise FileNotFoundError(f'cenet_mmdet has no config {name!r}. Give its path below '
                                f'{folder}; the nearest there are {nearest}.')
    return str(folder / name)
