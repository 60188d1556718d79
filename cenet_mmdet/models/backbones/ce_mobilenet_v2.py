"""MobileNetV2 with Channel Equilibrium layers; everything else is MMDetection's MobileNetV2."""
from typing import Any, Dict, Optional

from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from ..ce_network import CENetwork
from ..insert import insert_ce


@MODELS.register_module()
class CEMobileNetV2(CENetwork, MobileNetV2):
    """CE-MobileNetV2: CE after the last norm of each inverted residual (Table 2).

    That is the norm of the linear projection: CE stands before the addition. The paper places CE
    "following similar strategies" as in ResNet; its diagram, in appendix E, was not at hand. State
    dict keys are MobileNetV2's plus `layerX.Y.linear_conv.bn.ce.*`. `frozen_stages` freezes the CE
    layers of the stages it covers.

    Args:
        ce_cfg: arguments of the CE layers; `type` is CE unless given.
        **kwargs: those of CENetwork, which has the errors raised, and of MMDetection's MobileNetV2.
    """

    def __init__(self, ce_cfg: Optional[Dict] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        insert_ce(self, r'layer\d\.\d+\.linear_conv\.\w+', ce_cfg)
        self._freeze_stages()  # once more, for the layers just added
