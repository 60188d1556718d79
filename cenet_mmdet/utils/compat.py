"""What differs between the releases that the package runs with, torch 2.1 and mmdet 3.3 on."""
import torch

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # torch 2.1 and 2.2
    from torch._dynamo.external_utils import is_compiling

# Before torch 2.7, torch.export knows no variable sizes as they are needed here.
CAN_EXPORT = hasattr(torch.compiler, 'is_exporting')
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)

__all__ = ['CAN_EXPORT', 'is_compiling', 'is_exporting']
