"""Channel Equilibrium networks for MMDetection.

Importing the package registers the layers, norms, backbones and hooks in MMEngine's root
registries, which every OpenMMLab library sees, as far as what they need is installed:

    custom_imports = dict(imports=['cenet_mmdet'])

The layers and `insert_ce` need torch alone, the norms MMCV, the backbones MMDetection;
`cenet_mmdet.pretrain` has what needs mmpretrain. What a missing or broken library takes away is
left out; `python -m cenet_mmdet doctor` says how to mend an environment.
"""
import warnings
from contextlib import contextmanager

from .resources import config_path

__version__ = '0.1.0'
__all__ = ['config_path']
_broken = []


@contextmanager
def _part_for(library):
    """What is imported inside needs the library; the first that is there and fails is told of."""
    try:
        yield
    except Exception as error:  # version checks of OpenMMLab's libraries raise about anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        if not missing and not _broken:
            _broken.append(library)
            reason = (str(error).splitlines() or [''])[0]
            warnings.warn(f'cenet_mmdet: {library} is installed but cannot be used, what needs it '
                          f'is left out ({type(error).__name__}: {reason}). '
                          '`python -m cenet_mmdet doctor` says how to mend that.', stacklevel=4)


with _part_for('torch'):
    from .insert import insert_ce
    from .layers import CE, DBN, IterNorm, SyncCE

    __all__ += ['CE', 'DBN', 'IterNorm', 'SyncCE', 'insert_ce']

with _part_for('mmengine'):
    from mmengine.registry import MODELS

    from . import config_scope
    from .health import ChannelHealthHook
    from .resume import ExactResumeHook

    MODELS.register_module(module=CE)
    MODELS.register_module(module=SyncCE)
    config_scope.install()
    __all__ += ['ChannelHealthHook', 'ExactResumeHook']

with _part_for('mmcv'):
    from .norms import CEBN, CEGN, CEIN, CESyncBN

    __all__ += ['CEBN', 'CEGN', 'CEIN', 'CESyncBN']

with _part_for('mmdet'):
    from .backbones import CEMobileNetV2, CEResNet

    __all__ += ['CEMobileNetV2', 'CEResNet']
