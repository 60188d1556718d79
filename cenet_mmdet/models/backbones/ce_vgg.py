"""VGG with Channel Equilibrium layers; everything else is mmpretrain's VGG."""
from typing import Dict, Optional

from mmengine.registry import MODELS
from mmpretrain.models import VGG

from ..insert import insert_ce, selected_norms
from .ce_network import CENetwork


@MODELS.register_module()
class CEVGG(CENetwork, VGG):
    """CE-VGG: CE after the norms, before the rectifiers (Figures 1 to 5, section 5.3).

    State dict keys are VGG's plus `features.X.<norm>.ce.*`; plain VGG
    checkpoints with norms load as they are.

    Args:
        depth: 11, 13, 16 or 19.
        ce_cfg: arguments of the CE layers; `type` is CE unless given.
        ce_share: the share of the norms that CE follows, in (0, 1], rounded
            down and spread evenly over the depth. The paper compares 1, 0.75
            and 0.5 and does not say which norms they are.
        ce_position: 'after' the norms, or 'before' them for the paper's
            ablation (section 5.3).
        norm_cfg: batch norm unless given; CE needs one to stand behind.
        allow_unset: as in CENetwork.
        **kwargs: those of mmpretrain's VGG.

    Raises:
        ValueError: for a share out of its range, or too small for one layer;
            for an unknown position.
        CheckpointError, RuntimeError: as CENetwork's.
    """

    def __init__(self, depth: int, ce_cfg: Optional[Dict] = None, ce_share: float = 1.0,
                 ce_position: str = 'after', norm_cfg: Optional[Dict] = None,
                 allow_unset: bool = False, **kwargs):
        if ce_position not in ('after', 'before'):
            raise ValueError(f"ce_position must be 'after' or 'before', got {ce_position!r}")
        super().__init__(depth, norm_cfg=norm_cfg or dict(type='BN'), **kwargs)
        self.allow_unset = allow_unset
        norms = selected_norms(self, '.*')
        chosen = {name for index, name in enumerate(norms, 1)
                  if int(index * ce_share) > int((index - 1) * ce_share)}
        if not 0 < ce_share <= 1 or not chosen:
            raise ValueError(f'ce_share must lie in (0, 1] and select at least one of the '
                             f'{len(norms)} norms, got {ce_share!r}')
        insert_ce(self, lambda name, _: name in chosen, ce_cfg, before=ce_position == 'before')
