"""MMEngine's distributed training on machines without a GPU.

MMEngine's launcher and its model wrapper insist on an accelerator. What stands in
for them here lets the same commands run on CPUs, to try out or debug a config; with
a GPU none of it is used.
"""
import logging

import torch.distributed as dist
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import nn


def runs_on_cpu() -> bool:
    """Whether MMEngine will find no accelerator to put the model on."""
    return get_device() == 'cpu'


def init_process_group() -> None:
    """Join torchrun's other processes over gloo; MMEngine then takes the group as it is."""
    dist.init_process_group('gloo')


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMDistributedDataParallel for modules on the CPU.

    SyncBN layers become batch norms of each process, as torch has no SyncBN for
    CPUs. SyncCE layers stay synchronized.

    Args:
        module: the model.
        device_ids: the GPUs that MMEngine offers; not used.
        **kwargs: as MMDistributedDataParallel's.
    """

    def __init__(self, module: nn.Module, device_ids=None, **kwargs) -> None:
        if any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            print_log('SyncBN needs GPUs: on CPU each process normalizes by its own batch. '
                      'SyncCE layers stay synchronized.', logger='current',
                      level=logging.WARNING)
            module = revert_sync_batchnorm(module)
        super().__init__(module, broadcast_buffers=False, **kwargs)
