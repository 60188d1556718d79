"""MMEngine's distributed training, also on machines without a GPU, and an orderly end of it."""
import gc
import logging
import traceback
from contextlib import contextmanager
from typing import Any, Iterator, Optional, Sequence

import torch.distributed as dist

# Imported after a group was made, its functions would keep that group alive as their default.
import torch.distributed.nn  # noqa: F401
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import nn


@contextmanager
def process_group(cfg: Config) -> Iterator[None]:
    """Inside, MMEngine's Runner finds what `cfg.launcher` needs, also without a GPU.

    gloo's threads need the interpreter for a while after a collective, and abort the process if it
    shuts down meanwhile. So the group is destroyed at the end, which joins them. Neither a Runner
    nor an exception's frames may refer to the group then.
    """
    try:
        if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
            dist.init_process_group('gloo')
            cfg.model_wrapper_cfg = dict(type='CPUDistributedDataParallel')
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if dist.is_available() and dist.is_initialized():
            gc.collect()  # Runner and hooks refer to each other
            dist.destroy_process_group()


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMDistributedDataParallel for modules on the CPU; it leaves `device_ids` unused.

    SyncBN layers become batch norms of each process, as torch has no SyncBN for CPUs. SyncCE
    layers stay synchronized.
    """

    def __init__(self, module: nn.Module, device_ids: Optional[Sequence] = None,
                 **kwargs: Any) -> None:
        if any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            print_log('SyncBN needs GPUs: on CPU each process normalizes by its own batch. SyncCE '
                      'layers stay synchronized.', logger='current', level=logging.WARNING)
            module = revert_sync_batchnorm(module)
        super().__init__(module, broadcast_buffers=False, **kwargs)
