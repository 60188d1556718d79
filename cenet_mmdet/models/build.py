"""Models of config files, as tools need them."""
import os
import re
import textwrap
from pathlib import Path
from typing import Dict, Optional, Union

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ..utils.errors import InputError
from ..utils.resources import configs_dir

PathLike = Union[str, os.PathLike]


def load_config(path: PathLike, options: Optional[Dict] = None) -> Config:
    """The config of a file.

    Args:
        path: of a config file.
        options: dotted keys and values to merge into it, as `--cfg-options` gives them.

    Raises:
        InputError: there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f'config not found: {path}. Give the path of a config file, for example '
                         f'{configs_dir() / "mask_rcnn_ce_r50.py"}')
    cfg = Config.fromfile(str(path))
    cfg.merge_from_dict(options or {})
    return cfg


def init_scope(cfg: Config) -> None:
    """Make the library that a config belongs to the one that names in it refer to."""
    scope = cfg.get('default_scope') or 'mmdet'  # new-style configs have none
    if scope == 'mmpretrain':
        from . import mmpretrain  # noqa: F401  it imports the library, without torchvision too
    init_default_scope(scope)


def build_model(path: PathLike) -> nn.Module:
    """The model of a config, with random weights, for one process.

    Args:
        path: of the config of a detector or classifier.

    Raises:
        InputError: there is no such file.
    """
    cfg = load_config(path)
    init_scope(cfg)
    cfg.model.backbone.init_cfg = None
    with MODELS.switch_scope_and_registry(None) as registry:
        model = revert_sync_batchnorm(registry.build(cfg.model))
    if hasattr(model.backbone, 'allow_unset'):
        model.backbone.allow_unset = True  # frozen CE layers refuse to run on unset statistics
    return model


def load_model(config: PathLike, checkpoint: PathLike) -> nn.Module:
    """The model of a config in evaluation mode, with all its weights from a checkpoint.

    Raises:
        InputError: there is no such config or checkpoint, or the two do not fit together.
    """
    if not Path(checkpoint).is_file():
        raise InputError(f'checkpoint not found: {checkpoint}')
    model = build_model(config)
    load_weights(model, checkpoint, config)
    model.eval()
    return model


def load_weights(model: nn.Module, checkpoint: PathLike, config: PathLike) -> Dict:
    """Load all weights of a model from a checkpoint; the checkpoint.

    Entries `ema_*`, which MMDetection 2.x keeps beside the weights, are passed over.

    Args:
        model: what the config builds.
        checkpoint: path.
        config: path of the config, for the message.

    Raises:
        InputError: an entry is missing, too many, or of another shape.
    """
    content = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    expected = model.state_dict()
    entries = {re.sub(r'^module\.', '', key): value
               for key, value in content.get('state_dict', content).items()}
    extra = [key for key in entries if key.startswith('ema_') and key not in expected]
    for key in extra:
        del entries[key]
    if extra:
        print_log(f'{checkpoint}: {len(extra)} entries ema_* of MMDetection 2.x are passed over',
                  logger='current')
    try:
        model.load_state_dict(entries)
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f'{checkpoint} does not fit {config}: '
                         f'{textwrap.shorten(str(error), 500)}') from error
    return content


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: those of its first convolution."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
