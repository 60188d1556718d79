"""Where a network rectifies its channels."""
from typing import Dict

from torch import nn

from .modules import ce_layers

# Section 2 speaks of ReLU, LeakyReLU and ELU; the others came after or beside them.
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU,
              nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus)


def rectifiers(model: nn.Module) -> Dict[str, nn.Module]:
    """Rectifier modules by their names, but for those inside CE's own subnetwork F.

    Rectifiers that are called as functions (`F.relu`) are no modules, and not found.
    """
    inside = tuple(f'{name}.' if name else '' for name in ce_layers(model))
    return {name: module for name, module in model.named_modules()
            if isinstance(module, RECTIFIERS) and not name.startswith(inside)}
