"""Whether the weights that a run starts from arrive in its model."""
from importlib.util import find_spec
from typing import Any, Iterator, List, Mapping, Optional

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from torch import nn

from ..checkpoint.convert import backbone_entries, to_ours, under
from ..checkpoint.load import CheckpointError, load_if_safe
from ..models.ce_network import CENetwork
from ..utils.files import PathLike
from .annotations import examples


def check_checkpoint(path: PathLike) -> None:
    """Raises an InputError if there is no such file, or it is no checkpoint."""
    load_if_safe(path)


def weight_problems(model: Any, cfg: Config) -> List[str]:
    """What is wrong with the checkpoints that `init_cfg` and `load_from` name, a text for each."""
    if cfg.get('resume'):
        return []
    model = model.module if is_model_wrapper(model) else model
    if cfg.get('load_from'):
        return list(_problems('load_from', model, cfg.load_from, None, cfg))
    problems: List[str] = []
    for name, module in model.named_modules():
        init_cfg = getattr(module, 'init_cfg', None)
        for entry in init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]:
            if entry.get('type') == 'Pretrained' and entry.get('checkpoint'):
                where = f'model.{name}.init_cfg' if name else 'model.init_cfg'
                problems += _problems(where, module, entry['checkpoint'], entry.get('prefix'), cfg)
    return problems


def _problems(where: str, module: nn.Module, path: str, prefix: Optional[str],
              cfg: Config) -> Iterator[str]:
    variables = [name for name, value in cfg.env_variables.items() if value == path]
    origin = f' It is the value of {" and ".join(variables)}.' if variables else ''
    if path.startswith('torchvision://') and not find_spec('torchvision'):
        yield (f'{where}: {path} needs torchvision, which is not installed. Give the path of a '
               f'file instead.{origin}')
    try:
        content = load_if_safe(path)
    except CheckpointError as error:
        yield f'{where}: {error}{origin}'
        return
    if content is None:
        return
    entries = content.get('state_dict', content)
    start = prefix.rstrip('.') + '.' if prefix else 'module.'
    found = {key.removeprefix(start): value for key, value in entries.items()
             if hasattr(value, 'shape') and (not prefix or key.startswith(start))}
    if isinstance(module, CENetwork):
        found = backbone_entries(to_ours(found))
    expected = module.state_dict()
    arriving = [key for key, value in expected.items()
                if key in found and found[key].shape == value.shape]
    if len(arriving) < 0.2 * len(expected):  # some names are the same in many networks
        yield (f'{where}: of {len(expected)} entries of the network, {len(arriving)} arrive from '
               f'{path}. It has {examples(list(found or entries))}; the network has '
               f'{examples(list(expected))}. {_advice(expected, entries)}')


def _advice(expected: Mapping, entries: Mapping) -> str:
    for key in ('model', 'network', 'teacher', 'student'):
        if isinstance(entries.get(key), Mapping) and set(entries[key]) & set(expected):
            return (f'Its weights lie under the key {key!r}. Save them alone: torch.save('
                    f"torch.load(FILE)[{key!r}], 'weights.pth')")
    # Other trainers, parallel training and torch.compile put prefixes before the names.
    for prefix in ('model.', 'module.', '_orig_mod.', 'encoder_q.', 'backbone.'):
        if expected.keys() & under(prefix, entries):
            return f'Without the prefix {prefix!r} they fit: add prefix={prefix!r} to init_cfg.'
        if entries.keys() & under(prefix, expected):
            return (f'With the prefix {prefix!r} they fit: load them by model.{prefix}init_cfg='
                    "dict(type='Pretrained', checkpoint=FILE) instead.")
    return 'Give the checkpoint of a network of this kind.'
