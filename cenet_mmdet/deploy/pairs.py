"""Which convolutions a network has with a norm, and maybe CE, right behind them.

Modules do not tell in which order they are called. Three kinds of parents do: those that
call their children one after the other, MMCV's ConvModule, and ResNet-like blocks, by the
names and the order of their children (conv2, bn2).
"""
import re
from typing import Iterator, List, NamedTuple, Optional, Tuple

from mmcv.cnn import ConvModule
from torch import nn

from ..layers import CE
from ..models.insert import NormCE

Slot = Tuple[nn.Module, str]  # a parent and the name of its child


class Pair(NamedTuple):
    """A convolution, the norm behind it, and the CE behind that, if there is one."""
    name: str  # dotted, of the convolution
    conv: Slot
    norm: nn.Module
    ce: Optional[nn.Module]
    emptied: List[Slot]  # what is left without work by folding the three


def pairs(model: nn.Module) -> Iterator[Pair]:
    """All there are in the model; a convolution is named once."""
    for prefix, parent in model.named_modules():
        for conv, norm, ce in _children(parent):
            layers = [parent._modules[norm]]
            emptied = [(parent, norm)]
            if isinstance(layers[0], NormCE):
                if layers[0].before:
                    continue
                layers = [layers[0].norm, layers[0].ce]
            elif ce is not None:
                layers.append(parent._modules[ce])
                emptied.append((parent, ce))
            yield Pair(f'{prefix}.{conv}' if prefix else conv, (parent, conv), layers[0],
                       layers[1] if len(layers) > 1 else None, emptied)


def _children(parent: nn.Module) -> Iterator[Tuple[str, str, Optional[str]]]:
    """Names of a convolution, its norm and a separate CE among the children of `parent`."""
    if isinstance(parent, ConvModule):
        if parent.with_norm and parent.order[:2] == ('conv', 'norm'):
            yield 'conv', parent.norm_name, None
    elif isinstance(parent, nn.Sequential):
        names = list(parent._modules)
        for i, (conv, norm) in enumerate(zip(names, names[1:])):
            if isinstance(parent._modules[conv], nn.Conv2d):
                behind = names[i + 2] if i + 2 < len(names) else None
                yield conv, norm, behind if _is_ce(parent, behind) else None
    else:
        yield from _numbered_children(parent)


def _numbered_children(parent: nn.Module) -> Iterator[Tuple[str, str, Optional[str]]]:
    names = list(parent._modules)
    for conv in names:
        match = re.fullmatch(r'conv(\d*)', conv)
        if not match or parent._modules[conv] is None:
            continue
        number = match.group(1)
        norm = _norm_name(parent, number)
        # Where the norm comes first, as in pre-activation blocks, so it does here.
        if parent._modules.get(norm) is not None and names.index(norm) > names.index(conv):
            yield conv, norm, _ce_name(parent, number)


def _norm_name(parent: nn.Module, number: str) -> str:
    return vars(parent).get(f'norm{number}_name', f'bn{number}')


def _ce_name(parent: nn.Module, number: str) -> Optional[str]:
    """CE of our blocks (`ce`) and stem (`ce1`), or the only plugin behind the third norm.

    MMDetection's plugins after the first two convolutions come behind the ReLU.
    """
    plugins = vars(parent).get('after_conv3_plugin_names', []) if number == '3' else []
    candidates = [plugins[0] if len(plugins) == 1 else None, f'ce{number}',
                  'ce' if _ce_norm(parent) == f'norm{number}' else None]
    return next((name for name in candidates if _is_ce(parent, name)), None)


def _ce_norm(parent: nn.Module) -> Optional[str]:
    return getattr(parent, 'ce_norm', getattr(parent, 'last_norm', None))


def _is_ce(parent: nn.Module, name: Optional[str]) -> bool:
    return isinstance(parent._modules.get(name), CE)
