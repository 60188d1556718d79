"""Channel Equilibrium with statistics over all ranks (section 5.4, "SyncCE")."""
import copy

import torch.distributed as dist
from torch import Tensor, nn

from .all_reduce import all_reduce
from .ce import CE
from .moments import BatchMoments


class SyncCE(CE):
    """CE whose batch statistics are those of the batches of all ranks together.

    It is CE with one more step, the all-reduce of the moments: one collective
    in the forward pass and one in the backward pass, in training with
    statistics that are not frozen. Without an initialized process group, or
    with one process, it is CE. A rank without pixels takes part and gets an
    empty output. Works on CPU (gloo) and GPU (nccl).

    Args:
        *args, **kwargs: as CE's.
        process_group: the ranks to synchronize, as in `torch.nn.SyncBatchNorm`;
            None for all.
    """

    def __init__(self, *args, process_group=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    @classmethod
    def convert_sync_ce(cls, module: nn.Module, process_group=None) -> nn.Module:
        """The module with every CE layer replaced by a SyncCE of the same parameters."""
        return _replace(module, CE, cls, process_group=process_group)

    @classmethod
    def revert_sync_ce(cls, module: nn.Module) -> nn.Module:
        """The module with every SyncCE layer replaced by a CE of the same parameters."""
        return _replace(module, cls, CE)

    @property
    def synchronizes(self) -> bool:
        """Whether there are other ranks to hear from."""
        return (dist.is_available() and dist.is_initialized()
                and dist.get_world_size(self.process_group) > 1)

    def _takes_statistics_from(self, x: Tensor) -> bool:
        # An empty rank takes part: the others wait for it.
        return (self.uses_batch_statistics if self.synchronizes
                else super()._takes_statistics_from(x))

    def _over_ranks(self, batch: BatchMoments) -> BatchMoments:
        return all_reduce(batch, self.process_group) if self.synchronizes else batch


def _replace(module: nn.Module, old: type, new: type, **attributes) -> nn.Module:
    """Change the type of all layers that are exactly `old`, keeping parameters and buffers."""
    if type(module) is old:
        module = copy.copy(module)
        module.__class__ = new
        module.__dict__.pop('process_group', None)
        module.__dict__.update(attributes)
        return module
    for name, child in module.named_children():
        setattr(module, name, _replace(child, old, new, **attributes))
    return module
