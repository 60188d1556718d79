"""Channel Equilibrium networks for MMDetection.

Importing the package registers its layers, norms, backbones and hooks in MMEngine's root
registries, which every OpenMMLab library sees:

    custom_imports = dict(imports=['cenet_mmdet'])

The layers and `insert_ce` need torch alone, the hooks MMEngine, the norms MMCV and the backbones
MMDetection. Without one of these libraries, the parts that need it are left out.
`cenet_mmdet.models.mmpretrain` has the parts that need mmpretrain.
"""
import warnings
from importlib import import_module

from .utils.resources import config_path

__version__ = '0.1.0'
__all__ = ['config_path']


def _works(library: str) -> bool:
    """Whether the library is there; a warning tells if it is there and broken."""
    try:
        import_module(library)
    except Exception as error:  # OpenMMLab's libraries assert their neighbours' versions
        name = library.partition('.')[0]
        if not (isinstance(error, ModuleNotFoundError) and error.name == name):
            reason = (str(error).splitlines() or [''])[0]
            warnings.warn(f'cenet_mmdet: {name} is installed but cannot be imported '
                          f'({type(error).__name__}: {reason}). The parts that need it are left '
                          'out. Run `python -m cenet_mmdet doctor`.', stacklevel=3)
        return False
    return True


if _works('torch'):
    from .layers import CE, DBN, IterNorm, SyncCE
    from .models.insert import insert_ce

    __all__ += ['CE', 'DBN', 'IterNorm', 'SyncCE', 'insert_ce']

    if _works('mmengine.hooks'):
        from mmengine.registry import MODELS

        from .engine import ChannelHealthHook, DataCheckHook, ExactResumeHook

        MODELS.register_module(module=CE)
        MODELS.register_module(module=SyncCE)
        __all__ += ['ChannelHealthHook', 'DataCheckHook', 'ExactResumeHook']

        if _works('mmcv.cnn'):
            from .models.norm_layers import CEBN, CEGN, CEIN, CESyncBN

            __all__ += ['CEBN', 'CEGN', 'CEIN', 'CESyncBN']

            if _works('mmdet.models'):
                from .models.backbones import CEMobileNetV2, CEResNet

                __all__ += ['CEMobileNetV2', 'CEResNet']
