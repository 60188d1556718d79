"""Lets MMEngine resolve `cenet_mmdet::NAME`, a shipped config by its path below `configs_dir()`.

    _base_ = 'cenet_mmdet::mask_rcnn_ce_r50.py'
    mmengine.hub.get_config('cenet_mmdet::mask_rcnn_ce_r50.py')

MMEngine has a fixed list of packages and wants a folder in the name, so it needs help. It has it
once cenet_mmdet is imported, which the tools of this package do before they read a config. Where
other code reads it, `_base_` is resolved before `custom_imports`: use `config_path` there.
"""
import functools
from importlib import import_module

import mmengine.hub
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from .resources import config_path

PREFIX = 'cenet_mmdet::'


def install():
    """Extend MMEngine's three functions that take such names; every other name stays theirs."""
    Config._get_cfg_path = staticmethod(_extended(Config._get_cfg_path, _base_path))
    hub = mmengine.hub
    hub.get_config = _extended(hub.get_config, _get_config)
    hub.get_model = _extended(hub.get_model, _get_model)
    # what the two call, in case that somebody imported them before
    hub.hub._get_package_and_cfg_path = _extended(hub.hub._get_package_and_cfg_path, _too_early)


def _extended(original, ours):
    @functools.wraps(original)
    def function(cfg_path, *args, **kwargs):
        if str(cfg_path).startswith(PREFIX):
            return ours(cfg_path[len(PREFIX):], *args, **kwargs)
        return original(cfg_path, *args, **kwargs)

    return function


def _base_path(name, filename):
    """Path and scope of a base. As with a base by its path, its dicts are in no scope of ours."""
    return config_path(name), None


def _too_early(name):
    raise ImportError(f'{PREFIX}{name} is not known to get_config and get_model of mmengine.hub '
                      'if they were imported before cenet_mmdet. Import cenet_mmdet first.')


def _get_config(name, pretrained=False):
    if pretrained:
        raise ValueError(f'there are no weights to download for {PREFIX}{name}: leave pretrained '
                         'out, and give your checkpoint to mmengine.runner.load_checkpoint')
    return Config.fromfile(config_path(name))


def _get_model(name, pretrained=False, **kwargs):
    """Built in the scope of the library that the config is for, mmdet or mmpretrain."""
    cfg = _get_config(name, pretrained)
    if 'data_preprocessor' in cfg:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    import_module(f'{cfg.default_scope}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model, default_args=kwargs)
