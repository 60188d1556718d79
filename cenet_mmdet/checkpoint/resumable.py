"""The checkpoint that an interrupted run goes on from."""
import os
from contextlib import suppress
from pathlib import Path
from typing import Optional

from ..utils.errors import InputError
from ..utils.files import PathLike
from .load import CheckpointError, load_if_safe


def last_checkpoint(work_dir: PathLike) -> Optional[str]:
    """Path of the newest checkpoint in a work directory, None if there is none."""
    folder = Path(work_dir)
    # MMEngine notes the path here. If the directory was moved, the file's name is still right.
    pointer = folder / 'last_checkpoint'
    noted = Path(pointer.read_text().strip()) if pointer.is_file() else Path()
    newest_first = sorted(folder.glob('*.pth'), key=os.path.getmtime, reverse=True)
    candidates = (noted, folder / noted.name, *newest_first)
    return next((str(path) for path in candidates if path.is_file()), None)


def check_resumable(path: PathLike) -> None:
    """Raises an InputError if a run cannot go on from the checkpoint."""
    try:
        checkpoint = load_if_safe(path)
    except CheckpointError as error:
        intact = []
        for other in Path(path).parent.glob('*.pth'):
            with suppress(CheckpointError):
                load_if_safe(other)
                intact.append(other)
        newest = max(intact, key=os.path.getmtime, default=None)
        advice = f' Or resume from an intact one: --resume {newest}' if newest else ''
        raise InputError(f'cannot resume: {error}{advice}') from error
    needed = ('meta', 'state_dict', 'optimizer', 'message_hub')  # what MMEngine reads
    lacking = [key for key in needed if checkpoint is not None and key not in checkpoint]
    if lacking:
        raise InputError(f'cannot resume: {path} has no {", ".join(lacking)}. To start a new run '
                         f'from its weights, pass --cfg-options load_from={path} instead of '
                         '--resume.')
