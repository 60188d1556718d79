"""For configs of classifiers: mmpretrain, and the backbones that are built on its own.

    custom_imports = dict(imports=['cenet_mmdet.models.mmpretrain'])

mmpretrain imports torchvision for a few transforms and metrics that no config here uses. Where it
is not installed, placeholders stand in for it while mmpretrain is being imported. What is made of
them fails when used, and elsewhere in the process torchvision stays missing.
"""
import importlib
import logging
import sys
from importlib.util import find_spec
from typing import Any, Dict

from mmengine.logging import print_log

# The modules of torchvision that mmpretrain imports when it is imported itself.
TORCHVISION = ('torchvision', 'torchvision.ops', 'torchvision.ops.boxes', 'torchvision.transforms',
               'torchvision.transforms.functional', 'torchvision.transforms.transforms')


class _Missing(type):
    """Type of the placeholders: any attribute is there, none can be called."""

    def __getattr__(cls, name: str) -> '_Missing':
        if name.startswith('__'):
            raise AttributeError(name)
        return _Missing(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f'{cls.__name__} needs torchvision, which is not installed')


def _import_mmpretrain() -> None:
    placeholders: Dict[str, Any] = {}
    if not find_spec('torchvision'):
        print_log('torchvision is not installed: the parts of mmpretrain that need it will fail '
                  'when used', logger='current', level=logging.WARNING)
        placeholders = dict.fromkeys(TORCHVISION, _Missing('torchvision', (), {}))
    sys.modules.update(placeholders)
    try:
        for part in ('models', 'datasets', 'evaluation', 'engine', 'visualization'):
            importlib.import_module(f'mmpretrain.{part}')
    finally:
        for name in placeholders:
            del sys.modules[name]


_import_mmpretrain()

from mmengine.registry import MODELS  # noqa: E402
from mmpretrain.models.utils import SELayer  # noqa: E402

from ..datasets.cifar10 import CorruptedCIFAR10  # noqa: E402
from .backbones.on_mmpretrain import CEVGG, CEShuffleNetV2  # noqa: E402

# for ce_cfg=dict(type='SELayer'), the comparison with SE at CE's places
MODELS.register_module(module=SELayer)

__all__ = ['CEVGG', 'CEShuffleNetV2', 'CorruptedCIFAR10']
