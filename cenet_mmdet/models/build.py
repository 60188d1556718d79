"""Models of config files, as tools need them."""
import re
import textwrap
from pathlib import Path
from typing import Dict, Mapping, Optional

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ..checkpoint.load import load_if_safe
from ..utils.errors import InputError
from ..utils.files import PathLike
from ..utils.resources import configs_dir


def load_config(path: PathLike, options: Optional[Dict] = None) -> Config:
    """The config of a file, with options such as those of `--cfg-options` merged into it."""
    if not Path(path).is_file():
        raise InputError(f'config not found: {path}. Give the path of a config file, for example '
                         f'{configs_dir() / "mask_rcnn_ce_r50.py"}')
    cfg = Config.fromfile(str(path))
    cfg.merge_from_dict(options or {})
    return cfg


def init_scope(cfg: Config) -> None:
    """Let names in a config refer to the library that the config belongs to."""
    scope = cfg.get('default_scope') or 'mmdet'  # new-style configs have none
    if scope == 'mmpretrain':
        from . import mmpretrain  # noqa: F401  it imports the library, without torchvision too
    init_default_scope(scope)


def build_model(path: PathLike) -> nn.Module:
    """The model of a detector's or classifier's config, with random weights, for one process."""
    cfg = load_config(path)
    init_scope(cfg)
    cfg.model.backbone.init_cfg = None
    with MODELS.switch_scope_and_registry(None) as registry:
        model = revert_sync_batchnorm(registry.build(cfg.model))
    model.backbone.allow_unset = True  # frozen CE layers refuse to run on unset statistics
    return model


def load_model(config: PathLike, checkpoint: PathLike) -> nn.Module:
    """The model of a config in evaluation mode, with all its weights from a checkpoint."""
    model = build_model(config)
    load_weights(model, checkpoint, config)
    model.eval()
    return model


def load_weights(model: nn.Module, checkpoint: PathLike, config: PathLike) -> Mapping:
    """Load all weights of a config's model from a checkpoint, which is returned."""
    content = load_if_safe(checkpoint) or CheckpointLoader.load_checkpoint(str(checkpoint), 'cpu')
    entries = {re.sub(r'^module\.', '', key): value
               for key, value in content.get('state_dict', content).items()}
    # MMDetection 2.x keeps averages beside the weights.
    averages = {key for key in entries if key.startswith('ema_')} - model.state_dict().keys()
    if averages:
        print_log(f'{checkpoint}: {len(averages)} entries ema_* of MMDetection 2.x are passed over',
                  logger='current')
    try:
        model.load_state_dict({key: entries[key] for key in entries if key not in averages})
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f'{checkpoint} does not fit {config}: '
                         f'{textwrap.shorten(str(error), 500)}') from error
    return content


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: those of its first convolution."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
