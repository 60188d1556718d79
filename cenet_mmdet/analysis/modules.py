"""The layers of a network that can be measured, their selection by name, and which CE follows."""
import re
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from ..layers import CE, DBN, IterNorm
from ..models.insert import NormCE, channels_of, is_norm
from ..utils.errors import InputError

# Section 2 speaks of ReLU, LeakyReLU and ELU.
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU,
              nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus)
Layers = Optional[Union[str, Sequence[str]]]  # see `select`


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

    It is the name up to its first part with a number: 'layer1' for layer1.0.relu. In a network
    without stages it is the layer: 'features.3' for features.3.activate, '3' for 3. The layers in
    front of the first stage, such as relu or bn1.ce, belong to 'stem'.
    """
    parts = name.removesuffix('.ce').split('.')
    if parts[0] == 'stem' or (len(parts) == 1 and not parts[0].isdigit()):
        return 'stem'
    numbered = (i for i, part in enumerate(parts, 1) if re.search(r'\d', part))
    return '.'.join(parts[:next(numbered, 1)])


def select(candidates: Mapping[str, nn.Module], layers: Layers, kind: str) -> Dict[str, nn.Module]:
    """Those of the candidates, modules by name, that `layers` names; in their order.

    `layers` holds names, or regular expressions for whole names; None is all. An InputError is
    raised if there are no candidates, or an expression matches none; `kind` says what they are.
    """
    if not candidates:
        raise InputError(f'the model has no {kind}, so there is nothing to measure')
    patterns, chosen = '.*' if layers is None else layers, set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            matched = {name for name in candidates if re.fullmatch(pattern, name)}
        except re.error as error:
            raise InputError(f'layers: {pattern!r} is no regular expression ({error}); '
                             "for any characters write '.*'") from None
        if not matched:
            similar = get_close_matches(pattern, candidates, n=5, cutoff=0)
            raise InputError(f'layers: {pattern!r} matches the whole name of no {kind}; there are '
                             f'{len(candidates)}, such as {", ".join(map(repr, similar))}')
        chosen |= matched
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


def mark(output: Any, origin: Any) -> None:
    """Note on a norm's output where it comes from."""
    if output.is_inference():
        raise InputError('measure under torch.no_grad() instead of torch.inference_mode()')
    output.norm_origin = origin, output._version


def origin_of(x: Tensor) -> Any:
    """What `mark` noted; None if x is no norm's output or a rectifier changed it in place."""
    origin, version = getattr(x, 'norm_origin', (None, None))
    return origin if origin is not None and version == x._version else None


def norm_ce_pairs(model: nn.Module, run: Callable[[], object]) -> Dict[str, str]:
    """{name of a norm: name of the CE layer that follows it directly}, in the order of calls.

    `run` calls the model once, such as `lambda: model(images)`, in evaluation mode and without
    gradients. A CE layer behind a rectifier, or in front of its norm, is in no pair.
    """
    found = {}
    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, norm in norms(model).items():
            hooks.enter_context(norm.register_forward_hook(
                lambda norm, inputs, output, name=name: mark(output, name)))
        for name, ce in ce_layers(model).items():
            hooks.enter_context(ce.register_forward_pre_hook(
                lambda ce, inputs, name=name: found.update({origin_of(inputs[0]): name})))
        run()
    found.pop(None, None)
    return found
