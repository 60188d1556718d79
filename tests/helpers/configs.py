"""The shipped configs, each of which takes half a second to read."""
import copy
import functools

from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope


@functools.cache
def config(name):
    """A config by its path in configs/, to be read only."""
    return Config.fromfile(ROOT / 'configs' / name)


def build(name, scope='mmdet', **options):
    """The model of a config, with options like those of --cfg-options below `model.`."""
    cfg = copy.deepcopy(config(name))
    cfg.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    init_default_scope(scope)
    return MODELS.build(cfg.model)
