"""Checkpoints, read without running code that their pickle may hold."""
import pickle
import pkgutil
import re
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, List, Mapping, Optional

import torch

from ..utils.errors import first_line
from ..utils.files import PathLike
from .convert import CheckpointError

# What the checkpoints of MMEngine's runs hold beside tensors and plain Python, in the releases of
# numpy that have it.
MMENGINE_OBJECTS = (
    'mmengine.logging.history_buffer:HistoryBuffer', 'numpy:ndarray', 'numpy:dtype',
    *(f'numpy.{core}.multiarray:{name}' for core in ('_core', 'core')
      for name in ('_reconstruct', 'scalar')),
    *(f'numpy.dtypes:{name}DType'
      for name in ('Float64', 'Float32', 'Int64', 'Int32', 'UInt8', 'Bool', 'Str')),
)
# Objects can be allowed by their name from torch 2.6 on.
CAN_ALLOW = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint cannot be read without running code."""


def load(path: PathLike) -> Any:
    """What `torch.save` wrote, on the CPU; tensors are read from the disk when they are used.

    Raises:
        CheckpointError: there is no such file, or it is damaged or no checkpoint.
        UnsafeCheckpointError: it holds objects of other classes, whose code would run.
    """
    if not Path(path).is_file():
        raise CheckpointError(f'checkpoint not found: {path}. Give the path of a .pth file.')
    try:
        with _allowed_objects(), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'TypedStorage is deprecated')  # torch 2.1's own use
            return torch.load(str(path), map_location='cpu', weights_only=True,
                              mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files raise about anything
        raise _explained(error, path) from error


def load_if_safe(path: PathLike) -> Optional[Mapping]:
    """What `load` reads; None for what only MMEngine reads: s3:// and objects of other classes."""
    if '://' in str(path):
        return None
    try:
        checkpoint = load(path)
    except UnsafeCheckpointError:
        return None
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} holds no state dict.')
    return checkpoint


def _allowed_objects() -> ContextManager:
    if not CAN_ALLOW:
        return nullcontext()
    # A HistoryBuffer refers to its own methods.
    found: List[Any] = [(_history_buffer_method, 'builtins.getattr')]
    for name in MMENGINE_OBJECTS:
        try:
            found.append((pkgutil.resolve_name(name), name.replace(':', '.')))
        except (ImportError, AttributeError):  # another release of numpy, or no MMEngine
            continue
    return torch.serialization.safe_globals(found)


def _history_buffer_method(owner: Any, name: str) -> Any:
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'GLOBAL getattr({owner}, {name!r}) is not allowed')


def _explained(error: Exception, path: PathLike) -> CheckpointError:
    if 'TorchScript' in str(error):
        return CheckpointError(f'not a checkpoint: {path} is a TorchScript program. Give the state '
                               'dict that it was made from.')
    # torch puts pages of advice around the reason.
    reason = str(error).partition('WeightsUnpickler error: ')[2].partition('Check the doc')[0]
    refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)|but got <class '(\S+)'>",
                        reason or str(error))
    if not refused:
        return CheckpointError(f'not a checkpoint: {path} is damaged or was not written by '
                               f'torch.save ({reason.strip() or first_line(error)}). Get or write '
                               'it again.')
    if not CAN_ALLOW:
        return UnsafeCheckpointError(
            f'{path} holds more than weights, and torch {torch.__version__} cannot read it '
            'without running its code. Read it with torch 2.6 or newer.')
    return UnsafeCheckpointError(
        f'{path} holds {refused[1] or refused[2]}, which is neither a weight nor of an MMEngine '
        "run: reading it would run its code. Save the file's state_dict alone.")
