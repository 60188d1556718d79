"""ShuffleNetV2 and VGG of mmpretrain with Channel Equilibrium layers."""
from typing import Any, Dict, Optional

from mmengine.registry import MODELS
from mmpretrain.models import VGG, ShuffleNetV2

from ..ce_network import CENetwork
from ..insert import insert_ce, selected_norms


@MODELS.register_module()
class CEShuffleNetV2(CENetwork, ShuffleNetV2):
    """CE-ShuffleNetV2: CE after the last norm of each building block (Table 2).

    That is the norm of the second pointwise convolution of the branch that all blocks have: CE
    stands before its ReLU and the shuffle. The paper's diagram, in appendix E, was not at hand.
    State dict keys are ShuffleNetV2's plus `layers.X.Y.branch2.2.bn.ce.*`.

    Args:
        ce_cfg: arguments of the CE layers; `type` is CE unless given.
        **kwargs: those of CENetwork, which has the errors raised, and of mmpretrain's ShuffleNetV2.
    """

    def __init__(self, ce_cfg: Optional[Dict] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        insert_ce(self, r'layers\.\d+\.\d+\.branch2\.2\.\w+', ce_cfg)


@MODELS.register_module()
class CEVGG(CENetwork, VGG):
    """CE-VGG: CE after the norms, before the rectifiers (Figures 1 to 5, section 5.3).

    State dict keys are VGG's plus `features.X.<norm>.ce.*`.

    Args:
        depth: 11, 13, 16 or 19.
        ce_cfg: arguments of the CE layers; `type` is CE unless given.
        ce_share: the share of the norms that CE follows, in (0, 1], rounded down and spread evenly
            over the depth. The paper compares 1, 0.75 and 0.5, and does not say which norms.
        ce_position: 'after' the norms, or 'before' them for the paper's ablation (section 5.3).
        norm_cfg: batch norm unless given; CE needs a norm.
        **kwargs: those of CENetwork, which has more errors raised, and of mmpretrain's VGG.

    Raises:
        ValueError: for an unknown position, or a share out of its range or too small for one layer.
    """

    def __init__(self, depth: int, ce_cfg: Optional[Dict] = None, ce_share: float = 1.0,
                 ce_position: str = 'after', norm_cfg: Optional[Dict] = None,
                 **kwargs: Any) -> None:
        if ce_position not in ('after', 'before'):
            raise ValueError(f"ce_position must be 'after' or 'before', got {ce_position!r}")
        super().__init__(depth, norm_cfg=norm_cfg or dict(type='BN'), **kwargs)
        norms = selected_norms(self, '.*')
        chosen = {name for index, name in enumerate(norms, 1)
                  if int(index * ce_share) > int((index - 1) * ce_share)}
        if not 0 < ce_share <= 1 or not chosen:
            raise ValueError(f'ce_share must lie in (0, 1] and select at least one of the '
                             f'{len(norms)} norms, got {ce_share!r}')
        insert_ce(self, lambda name, _: name in chosen, ce_cfg, before=ce_position == 'before')
