"""The checkpoint that an interrupted run goes on from."""
import os
from pathlib import Path
from typing import Optional, Union

from ..utils.errors import InputError
from .load import CheckpointError, UnsafeCheckpointError, load

# What MMEngine reads to go on with a run.
NEEDED = ('meta', 'state_dict', 'optimizer', 'message_hub')


def last_checkpoint(work_dir: Union[str, os.PathLike]) -> Optional[str]:
    """Path of the newest checkpoint in a work directory, None if there is none.

    MMEngine notes the path in the file `last_checkpoint`. Where the directory was moved, that
    path is an old one, and the checkpoint of the same name is meant.
    """
    folder = Path(work_dir)
    pointer = folder / 'last_checkpoint'
    noted = Path(pointer.read_text().strip()) if pointer.is_file() else Path()
    for path in (noted, folder / noted.name):
        if path.is_file():
            return str(path)
    found = sorted(folder.glob('*.pth'), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None


def check_resumable(path: Union[str, os.PathLike]) -> None:
    """Raises an InputError if a run cannot go on from the checkpoint."""
    if '://' in str(path):
        return  # MMEngine's own
    try:
        checkpoint = load(path)
    except UnsafeCheckpointError:
        return  # MMEngine reads it, and trusts it
    except CheckpointError as error:
        intact = [str(other) for other in Path(path).parent.glob('*.pth') if _is_intact(other)]
        newest = max(intact, key=os.path.getmtime, default=None)
        raise InputError(f'cannot resume: {error}'
                         + (f' Or resume from an intact one: --resume {newest}' if newest else '')
                         ) from error
    lacking = [key for key in NEEDED if key not in checkpoint]
    if lacking:
        raise InputError(f'cannot resume: {path} has no {", ".join(lacking)}. To start a new run '
                         f'from its weights, pass --cfg-options load_from={path} instead of '
                         '--resume.')


def _is_intact(path: Path) -> bool:
    try:
        load(path)
    except UnsafeCheckpointError:
        return True
    except CheckpointError:
        return False
    return True
