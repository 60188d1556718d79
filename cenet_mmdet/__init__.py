"""Channel Equilibrium networks for MMDetection.

Importing the package registers the layers, norms, backbones and hooks in MMEngine's root
registries, which every OpenMMLab library sees, as far as what they need is installed:

    custom_imports = dict(imports=['cenet_mmdet'])

The layers and `insert_ce` need torch alone, the norms MMCV, the backbones MMDetection;
`cenet_mmdet.pretrain` has what needs mmpretrain.
"""
from importlib.util import find_spec

from .insert import insert_ce
from .layers import CE, DBN, IterNorm, SyncCE

__version__ = '0.1.0'
__all__ = ['CE', 'DBN', 'IterNorm', 'SyncCE', 'insert_ce']

if find_spec('mmengine'):
    from mmengine.registry import MODELS

    from .health import ChannelHealthHook
    from .resume import ExactResumeHook

    MODELS.register_module(module=CE)
    MODELS.register_module(module=SyncCE)
    __all__ += ['ChannelHealthHook', 'ExactResumeHook']

if find_spec('mmcv'):
    from .norms import CEBN, CEGN, CEIN, CESyncBN

    __all__ += ['CEBN', 'CEGN', 'CEIN', 'CESyncBN']

if find_spec('mmdet'):
    from .backbones import CEMobileNetV2, CEResNet

    __all__ += ['CEMobileNetV2', 'CEResNet']
