"""MobileNetV2 with Channel Equilibrium layers; everything else is MMDetection's MobileNetV2."""
from typing import Dict, Optional

from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from ..insert import insert_ce
from .ce_network import CENetwork


@MODELS.register_module()
class CEMobileNetV2(CENetwork, MobileNetV2):
    """CE-MobileNetV2: CE after the last norm of each inverted residual (Table 2).

    The paper's diagram is in an appendix that was not published with it; this
    is "following similar strategies" as for ResNet. The last norm of a block is
    that of its linear projection, so CE stands before the addition, and no
    rectifier follows it directly.

    State dict keys are MobileNetV2's plus `layerX.Y.linear_conv.bn.ce.*`; plain
    MobileNetV2 checkpoints load as they are. `frozen_stages` freezes the CE
    layers of the stages it covers.

    Args:
        ce_cfg: arguments of the CE layers; `type` is CE unless given.
        allow_unset: as in CENetwork.
        **kwargs: those of MMDetection's MobileNetV2.

    Raises:
        CheckpointError, RuntimeError: as CENetwork's.
    """

    def __init__(self, ce_cfg: Optional[Dict] = None, allow_unset: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.allow_unset = allow_unset
        insert_ce(self, r'layer\d\.\d+\.linear_conv\.\w+', ce_cfg)
        self._freeze_stages()  # once more, for the layers just added
