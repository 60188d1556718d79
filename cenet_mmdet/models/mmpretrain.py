"""For configs of classifiers: mmpretrain, and the backbones that are built on its own.

    custom_imports = dict(imports=['cenet_mmdet.models.mmpretrain'])

mmpretrain imports torchvision for a few transforms and metrics that no config here
uses. Where torchvision is not installed, as beside a CPU build of torch, placeholders
stand in for it while mmpretrain is being imported, and what is made of them fails
when used; elsewhere in the process torchvision stays as missing as it is.
"""
import contextlib
import importlib
import logging
import sys
from importlib.util import find_spec
from types import ModuleType

from mmengine.logging import print_log

# The modules of torchvision that mmpretrain imports when it is imported itself.
TORCHVISION = ('torchvision', 'torchvision.ops', 'torchvision.ops.boxes',
               'torchvision.transforms', 'torchvision.transforms.functional',
               'torchvision.transforms.transforms')


class _Missing(type):
    """Type of the placeholders: any attribute is there, none can be called."""

    def __getattr__(cls, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return _Missing(name, (), {})

    def __call__(cls, *args, **kwargs):
        raise ImportError(f'{cls.__name__} needs torchvision, which is not installed')


@contextlib.contextmanager
def _placeholders():
    for name in TORCHVISION:
        module = sys.modules[name] = ModuleType(name)
        module.__getattr__ = lambda attribute: getattr(_Missing('torchvision', (), {}), attribute)
        parent, _, child = name.rpartition('.')
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in TORCHVISION:
            del sys.modules[name]


def _import_mmpretrain() -> None:
    if not find_spec('mmpretrain'):
        raise ImportError('classifiers need mmpretrain: pip install onedl-mmpretrain')
    missing = not find_spec('torchvision')
    if missing:
        print_log('torchvision is not installed: the parts of mmpretrain that need it will fail '
                  'when used', logger='current', level=logging.WARNING)
    with _placeholders() if missing else contextlib.nullcontext():
        for part in ('models', 'datasets', 'evaluation', 'engine', 'visualization'):
            importlib.import_module(f'mmpretrain.{part}')


_import_mmpretrain()

from mmengine.registry import MODELS  # noqa: E402
from mmpretrain.models.utils import SELayer  # noqa: E402

from ..datasets.cifar10 import CorruptedCIFAR10  # noqa: E402
from .backbones.ce_shufflenet_v2 import CEShuffleNetV2  # noqa: E402
from .backbones.ce_vgg import CEVGG  # noqa: E402

# for ce_cfg=dict(type='SELayer'), the comparison with SE at CE's places
MODELS.register_module(module=SELayer)

__all__ = ['CEVGG', 'CEShuffleNetV2', 'CorruptedCIFAR10']
