"""ShuffleNetV2 with Channel Equilibrium layers; everything else is mmpretrain's ShuffleNetV2."""
from typing import Dict, Optional

from mmengine.registry import MODELS
from mmpretrain.models import ShuffleNetV2

from ..insert import insert_ce
from .ce_network import CENetwork


@MODELS.register_module()
class CEShuffleNetV2(CENetwork, ShuffleNetV2):
    """CE-ShuffleNetV2: CE after the last norm of each building block (Table 2).

    That is the norm of the second pointwise convolution of the branch that all
    blocks have; CE stands before its ReLU and the shuffle. The paper's diagram
    is in an appendix that was not published with it.

    State dict keys are ShuffleNetV2's plus `layers.X.Y.branch2.2.bn.ce.*`;
    plain ShuffleNetV2 checkpoints load as they are.

    Args:
        ce_cfg: arguments of the CE layers; `type` is CE unless given.
        allow_unset: as in CENetwork.
        **kwargs: those of mmpretrain's ShuffleNetV2.

    Raises:
        CheckpointError, RuntimeError: as CENetwork's.
    """

    def __init__(self, ce_cfg: Optional[Dict] = None, allow_unset: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.allow_unset = allow_unset
        insert_ce(self, r'layers\.\d+\.\d+\.branch2\.2\.\w+', ce_cfg)
