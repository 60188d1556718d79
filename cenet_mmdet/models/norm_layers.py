"""Norms for `norm_cfg` of any OpenMMLab model: CE behind each of its norms.

    norm_cfg = dict(type='CEBN', ce_cfg=dict(group_size=16))
"""
from typing import Any, Dict, Optional

from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS

from ..layers import DBN, IterNorm
from .insert import NormCE, build_layer


class _CENorm(NormCE):
    """A norm with CE behind it; checkpoints of the plain norm load as they are.

    Args:
        num_features: number of channels.
        ce_cfg: arguments of the CE layer; `type` is CE unless given.
        **kwargs: arguments of the norm, as in a norm_cfg.
    """
    norm_type: str  # as in a norm_cfg

    def __init__(self, num_features: int, ce_cfg: Optional[Dict] = None, **kwargs: Any) -> None:
        _, norm = build_norm_layer(dict(type=self.norm_type, **kwargs), num_features)
        super().__init__(norm, build_layer(ce_cfg, num_features))


@MODELS.register_module()
class CEBN(_CENorm):
    norm_type = 'BN'
    _abbr_ = 'bn'  # MMCV names layers after this


@MODELS.register_module()
class CESyncBN(_CENorm):
    norm_type = 'SyncBN'
    _abbr_ = 'bn'


@MODELS.register_module()
class CEGN(_CENorm):
    norm_type = 'GN'
    _abbr_ = 'gn'


@MODELS.register_module()
class CEIN(_CENorm):
    norm_type = 'IN'
    _abbr_ = 'in'


MODELS.register_module(module=IterNorm)
MODELS.register_module(module=DBN)
