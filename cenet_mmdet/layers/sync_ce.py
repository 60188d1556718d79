"""Channel Equilibrium with statistics over all ranks (section 5.4, "SyncCE")."""
from typing import Any, Optional, Type

import torch.distributed as dist
from torch import Tensor, nn

from .ce import CE
from .steps.all_reduce import all_reduce
from .steps.moments import BatchMoments


class SyncCE(CE):
    """CE whose batch statistics are those of the batches of all ranks together.

    It is CE with the moments summed over the ranks: one collective in the forward pass and one in
    the backward pass, in training with statistics that are not frozen. Without an initialized
    process group, or with one process, it is CE. A rank without pixels takes part and gets an
    empty output. Works on CPU (gloo) and GPU (nccl).

    Args:
        *args, **kwargs: as CE's.
        process_group: the ranks to synchronize, as in `torch.nn.SyncBatchNorm`; None for all.
    """

    def __init__(self, *args: Any, process_group: Optional[Any] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    @classmethod
    def convert_sync_ce(cls, module: nn.Module, process_group: Optional[Any] = None) -> nn.Module:
        """The module with every CE layer replaced by a SyncCE with the same parameters."""
        return _convert(module, CE, cls, process_group=process_group)

    @classmethod
    def revert_sync_ce(cls, module: nn.Module) -> nn.Module:
        """The module with every SyncCE layer replaced by a CE with the same parameters."""
        return _convert(module, cls, CE)

    @property
    def synchronizes(self) -> bool:
        """Whether the next forward in training exchanges moments with other ranks."""
        return (dist.is_available() and dist.is_initialized()
                and dist.get_world_size(self.process_group) > 1)

    def takes_statistics_from(self, x: Tensor) -> bool:
        # An empty rank takes part: the others wait for it.
        return (self.uses_batch_statistics if self.synchronizes
                else super().takes_statistics_from(x))

    def over_ranks(self, batch: BatchMoments) -> BatchMoments:
        """Step 2: moments of the batches of all ranks."""
        return all_reduce(batch, self.process_group) if self.synchronizes else batch


def _convert(module: nn.Module, old: Type[CE], new: Type[CE], **options: Any) -> nn.Module:
    """The module with all layers that are exactly `old` rebuilt as `new`."""
    if isinstance(module, CE) and type(module) is old:
        layer = new(**module.arguments(), **options, device='meta')
        # The very same tensors: an optimizer may hold the parameters already.
        for name, tensor in [*module.named_parameters(recurse=False),
                             *module.named_buffers(recurse=False)]:
            setattr(layer, name, tensor)
        if module.has_ir:
            layer.reweighting = module.reweighting
        return layer.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _convert(child, old, new, **options))
    return module
