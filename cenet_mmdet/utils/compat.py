"""What differs between the releases that the package runs with, torch 2.1 and mmdet 3.3 on."""
import torch

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # torch 2.1 and 2.2
    from torch._dynamo.external_utils import is_compiling

if hasattr(torch.compiler, 'is_exporting'):
    CAN_EXPORT = True
    is_exporting = torch.compiler.is_exporting
else:  # before torch 2.7, whose torch.export knows no variable sizes as they are needed here
    CAN_EXPORT = False

    def is_exporting() -> bool:
        return False


__all__ = ['CAN_EXPORT', 'is_compiling', 'is_exporting']
