"""The layers of a network that can be measured, and their selection by name."""
import re
from contextlib import contextmanager
from typing import Dict, Iterator, Optional, Sequence, Union

from torch import nn

from ..layers import CE, DBN, IterNorm
from ..models.insert import NormCE, channels_of, is_norm
from ..utils.errors import InputError

# Section 2 speaks of ReLU, LeakyReLU and ELU.
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU,
              nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus)

# Regular expressions, each of which must match the whole dotted name of at least one layer;
# a name is one for itself. None selects all layers of the kind.
Layers = Optional[Union[str, Sequence[str]]]


def norms(model: nn.Module) -> Dict[str, nn.Module]:
    """Norms of feature maps (N, C, ...) by their names: those that CE can follow, IterNorm, DBN.

    A norm with CE from `insert_ce` goes by the name that it has in the network without CE.
    """
    places = {m.norm: name for name, m in model.named_modules() if isinstance(m, NormCE)}
    return {places.get(m, name): m for name, m in _outside_ce(model).items()
            if isinstance(m, (DBN, IterNorm)) or (is_norm(m) and channels_of(m) is not None)}


def ce_layers(model: nn.Module) -> Dict[str, CE]:
    """CE and SyncCE layers by their names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CE)}


def rectifiers(model: nn.Module) -> Dict[str, nn.Module]:
    """Rectifier modules by their names; those that are called as functions are not found."""
    return {name: m for name, m in _outside_ce(model).items() if isinstance(m, RECTIFIERS)}


def _outside_ce(model: nn.Module) -> Dict[str, nn.Module]:
    """All modules but those in the IR subnetworks of CE layers."""
    inside = tuple(f'{name}.' if name else '' for name in ce_layers(model))
    return {name: m for name, m in model.named_modules() if not name.startswith(inside)}


def stage(name: str) -> str:
    """The stage of a network that a layer belongs to, from the layer's name.

    That is the name up to its first part with a number: 'layer1' for layer1.0.relu. In a network
    without stages, such as a VGG, it is the layer: 'features.3' for features.3.activate, '3' for
    3. The layers in front of the first stage, such as relu or bn1.ce, belong to 'stem'.
    """
    parts = name.removesuffix('.ce').split('.')
    if parts[0] == 'stem' or (len(parts) == 1 and not parts[0].isdigit()):
        return 'stem'
    numbered = (i for i, part in enumerate(parts, 1) if re.search(r'\d', part))
    return '.'.join(parts[:next(numbered, 1)])


def select(candidates: Dict[str, nn.Module], layers: Layers, kind: str) -> Dict[str, nn.Module]:
    """Those of the candidates, modules by name, that `layers` names; in their order.

    Raises:
        InputError: there are no candidates, or a pattern matches none; `kind` says what they are.
    """
    if not candidates:
        raise InputError(f'the model has no {kind}, so there is nothing to measure')
    if layers is None:
        return candidates
    examples = 'such as ' + ', '.join(map(repr, list(candidates)[:5]))
    chosen = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        try:
            matched = {name for name in candidates if re.fullmatch(pattern, name)}
        except re.error as error:
            raise InputError(f'layers: {pattern!r} is no regular expression ({error}); '
                             "for any characters write '.*'") from None
        if not matched:
            raise InputError(f'layers: {pattern!r} matches the whole name of no {kind}; '
                             f'there are {len(candidates)}, {examples}')
        chosen |= matched
    if not chosen:
        raise InputError(f'layers is empty; name at least one {kind}, {examples}')
    return {name: module for name, module in candidates.items() if name in chosen}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode back."""
    # model.train() would also unfreeze norms that are kept in evaluation.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
