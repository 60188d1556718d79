"""Channel Equilibrium networks for MMDetection.

Importing the package registers CE, SyncCE, a hook and, where MMDetection is installed,
the backbones in MMEngine's root registries, which every OpenMMLab library sees:

    custom_imports = dict(imports=['cenet_mmdet'])

The layers themselves need torch alone.
"""
from importlib.util import find_spec

from .layers import CE, SyncCE

__version__ = '0.1.0'
__all__ = ['CE', 'SyncCE']

if find_spec('mmengine'):
    from mmengine.registry import MODELS

    from .resume import ExactResumeHook

    MODELS.register_module(module=CE)
    MODELS.register_module(module=SyncCE)
    __all__ += ['ExactResumeHook']

if find_spec('mmdet'):
    from .backbones import CEResNet

    __all__ += ['CEResNet']
