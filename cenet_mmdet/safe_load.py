"""Checkpoints, read without running code that their pickle may hold.

`torch.load(weights_only=True)` refuses the checkpoints of MMEngine's runs, which keep objects of
MMEngine and numpy beside the weights. Here those come back as empty placeholders instead, and
torch's tensors as they are.
"""
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict

import torch
from torch import Tensor

from .checkpoints import CheckpointError, named_tensors

# What dense tensors are pickled with, in the versions of torch that have it.
REBUILD = {name: getattr(torch._utils, name)
           for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3',
                        '_rebuild_parameter')
           if hasattr(torch._utils, name)}
ALLOWED = {('collections', 'OrderedDict'): OrderedDict,
           ('torch', 'Size'): torch.Size,
           ('torch.storage', 'UntypedStorage'): torch.UntypedStorage,
           **{('torch._utils', name): function for name, function in REBUILD.items()}}


def load_tensors(path) -> Dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, and read from the disk only when used.

    Args:
        path: of a state dict, or of a checkpoint with one under `state_dict`, written by
            `torch.save` in its present format or in that of torch before 1.6 (which is read at
            once). Sparse and quantized tensors are left out.

    Raises:
        CheckpointError: if there is no such file, it is no checkpoint or a damaged one, or holds
            no tensors; one line that names the file.
    """
    if not Path(path).is_file():
        raise CheckpointError(f'checkpoint not found: {path}. Give the path of a .pth file.')
    try:
        checkpoint = load(path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged pickles raise about anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'not a checkpoint: {path} is truncated or was not written by '
                              f'torch.save ({reason}). Get or write it again.') from error
    try:
        return named_tensors(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'no weights in {path}: {error}') from None


def load(path) -> Any:
    """What `torch.save` wrote, with placeholders for all that is neither plain Python nor a tensor.

    Tensors stay on the disk until they are used, where the format allows.

    Raises:
        Exception: of any kind, if the file is damaged or something else.
    """
    is_zip = zipfile.is_zipfile(path)
    _check_format(path, is_zip)
    return torch.load(str(path), map_location='cpu', weights_only=False, mmap=is_zip,
                      pickle_module=_Pickle)


def _check_format(path, is_zip: bool) -> None:
    """Refuse the two formats that torch.load reads in ways of its own, without our unpickler."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith('constants.pkl') for name in names):
            raise CheckpointError(f'not a checkpoint: {path} is a TorchScript program. Give the '
                                  'state dict that it was made from.')
    elif tarfile.is_tarfile(path):
        raise CheckpointError(f'not a checkpoint: {path} is a tar archive. Unpack it, and give the '
                              'path of a .pth file.')


class _Placeholder:
    """Stands for any class or function that is not torch's; takes whatever a pickle does to it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def _ignore(self, *args):
        pass

    __setitem__ = append = extend = _ignore


class _Unpickler(pickle._Unpickler):  # the one in Python: in the one in C, steps cannot be replaced

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return ALLOWED.get((module, name), _Placeholder)

    def _drop_state(self) -> None:
        # It would be set on any object, torch's functions and classes among them.
        self.stack.pop()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _drop_state}


class _Pickle:
    """What torch.load wants of a pickle module."""
    Unpickler = _Unpickler

    @staticmethod
    def load(file, **options) -> Any:
        return _Unpickler(file, **options).load()
