"""Whether the weights that a run starts from arrive in its model."""
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from torch import nn

from ..checkpoint.convert import keep_backbone, to_ours
from ..checkpoint.load import CheckpointError, UnsafeCheckpointError, load
from ..models.backbones.ce_network import CENetwork
from ..utils.errors import InputError

# Prefixes of other trainers, parallel training and torch.compile.
PREFIXES = ('model.', 'module.', '_orig_mod.', 'encoder_q.', 'backbone.')
FEW = 0.2  # share of a module's entries


def check_checkpoint(path: str) -> None:
    """Raises an InputError if there is no such file, or it is no checkpoint."""
    problem = _unreadable(path)
    if problem:
        raise InputError(problem)


def weight_problems(model: nn.Module, cfg: Config) -> List[str]:
    """What is wrong with the checkpoints that `init_cfg` and `load_from` name, a text for each.

    Paths with a scheme, such as s3://, are MMEngine's own and left alone.

    Args:
        model: built, before its weights are loaded.
        cfg: its config.
    """
    model = model.module if is_model_wrapper(model) else model
    problems = []
    if cfg.get('load_from') and not cfg.get('resume'):
        problems += _arrival('load_from', model, cfg.load_from, None, cfg)
    elif not cfg.get('resume'):
        for name, module in model.named_modules():
            for checkpoint, prefix in _pretrained(module):
                where = f'model.{name}.init_cfg' if name else 'model.init_cfg'
                problems += _arrival(where, module, checkpoint, prefix, cfg)
    return problems


def _pretrained(module: nn.Module) -> Iterator[Tuple[str, Optional[str]]]:
    init_cfg = getattr(module, 'init_cfg', None)
    for entry in init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]:
        if entry.get('type') == 'Pretrained' and entry.get('checkpoint'):
            yield entry['checkpoint'], entry.get('prefix')


def _arrival(where: str, module: nn.Module, path: str, prefix: Optional[str],
             cfg: Config) -> List[str]:
    """The problem with loading a checkpoint into a module, if there is one."""
    if path.startswith('torchvision://') and not find_spec('torchvision'):
        return [f'{where}: {path} needs torchvision, which is not installed. Give the path of a '
                f'file instead{_variables(path, cfg)}.']
    if '://' in path:
        return []
    problem = _unreadable(path)
    if problem:
        return [f'{where}: {problem} Give the path of another file{_variables(path, cfg)}.']
    try:
        content = load(path)
    except UnsafeCheckpointError:
        return []  # MMEngine reads it, and trusts it
    entries = content.get('state_dict', content)
    expected = module.state_dict()
    found = _entries(module, entries, prefix)
    arriving = [key for key, value in expected.items()
                if key in found and tuple(found[key].shape) == tuple(value.shape)]
    if len(arriving) >= FEW * len(expected):
        return []
    return [f'{where}: of {len(expected)} entries of the network, {len(arriving)} arrive from '
            f'{path}. It has {_names(found or entries)}; the network has {_names(expected)}. '
            f'{_advice(expected, entries)}']


def _entries(module: nn.Module, entries: Mapping, prefix: Optional[str]) -> Dict:
    """The tensors under the names that the module will be loaded with."""
    prefix = (prefix or 'module.').rstrip('.') + '.'
    found = {key[len(prefix):] if key.startswith(prefix) else key: value
             for key, value in entries.items() if hasattr(value, 'shape')
             and (prefix == 'module.' or key.startswith(prefix))}
    if isinstance(module, CENetwork):
        found = to_ours(found)
        keep_backbone(found)
    return found


def _advice(expected: Mapping, entries: Mapping) -> str:
    for key in ('model', 'network', 'teacher', 'student'):
        if isinstance(entries.get(key), Mapping) and set(entries[key]) & set(expected):
            return (f'Its weights lie under the key {key!r}. Save them alone: torch.save('
                    f"torch.load(FILE)[{key!r}], 'weights.pth')")
    for prefix in PREFIXES:
        if {key[len(prefix):] for key in entries if key.startswith(prefix)} & set(expected):
            return f'Without the prefix {prefix!r} they fit: add prefix={prefix!r} to init_cfg.'
        if {prefix + key for key in entries} & set(expected):
            name = prefix.rstrip('.')
            return (f'With the prefix {prefix!r} they fit: load them by model.{name}.init_cfg='
                    "dict(type='Pretrained', checkpoint=FILE) instead.")
    return 'Give the checkpoint of a network of this kind.'


def _names(entries: Mapping) -> str:
    return ', '.join(list(entries)[:3]) + ' ...'


def _unreadable(path: str) -> str:
    if '://' in str(path):
        return ''
    if not Path(path).is_file():
        return f'checkpoint not found: {path}.'
    try:
        content = load(path)
    except UnsafeCheckpointError:
        return ''
    except CheckpointError as error:
        return str(error)
    return '' if isinstance(content, Mapping) else f'{path} holds no state dict.'


def _variables(path: str, cfg: Config) -> str:
    """The environment variables whose value the path is."""
    names = [name for name, value in getattr(cfg, 'env_variables', {}).items() if value == path]
    return f', for example in {" or ".join(names)}' if names else ''
