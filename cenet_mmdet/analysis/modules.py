"""Which layers of a network there are to measure, and which of them the user means."""
import re
from contextlib import contextmanager
from typing import Dict, Iterator, Optional, Sequence, Union

from torch import nn

from ..layers import CE, DBN, IterNorm
from ..models.insert import NORMS as TORCH_NORMS
from ..models.insert import NormCE

NORMS = (*TORCH_NORMS, DBN, IterNorm)

# Regular expressions, each of which must match the whole of at least one dotted name; a
# name is one for itself. None is for all layers of the kind in question.
Layers = Optional[Union[str, Sequence[str]]]


def norms(model: nn.Module) -> Dict[str, nn.Module]:
    """Batch (synchronized or not), instance, group and decorrelating norms by their names."""
    return _of_type(model, NORMS)


def norms_with_ce(model: nn.Module) -> Dict[str, nn.Module]:
    """As `norms`, but what `insert_ce` put in the place of a norm stands for both."""
    found = _of_type(model, (NormCE, *NORMS))
    inside = tuple(f'{name}.' if name else '' for name, module in found.items()
                   if isinstance(module, NormCE))
    return {name: module for name, module in found.items()
            if isinstance(module, NormCE) or not name.startswith(inside)}


def ce_layers(model: nn.Module) -> Dict[str, CE]:
    """CE and SyncCE layers by their names."""
    return _of_type(model, CE)


def _of_type(model: nn.Module, types) -> Dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, types)}


def select(candidates: Dict[str, nn.Module], layers: Layers, kind: str) -> Dict[str, nn.Module]:
    """Those of the candidates that `layers` names, in the order of the candidates.

    Args:
        candidates: modules by name.
        layers: see `Layers`.
        kind: what the candidates are, for messages.

    Raises:
        ValueError: if there are no candidates, or a pattern matches none of them.
    """
    if not candidates:
        raise ValueError(f'the model has no {kind}, so there is nothing to measure')
    if layers is None:
        return candidates
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError(f'layers is empty; name at least one {kind}, '
                         f'{_examples(candidates)}')
    chosen = set()
    for pattern in patterns:
        matched = _matches(candidates, pattern)
        if not matched:
            raise ValueError(f'layers: {pattern!r} matches the whole name of no {kind}; '
                             f'there are {len(candidates)}, {_examples(candidates)}')
        chosen.update(matched)
    return {name: module for name, module in candidates.items() if name in chosen}


def _matches(candidates, pattern: str):
    try:
        return [name for name in candidates if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f'layers: {pattern!r} is no regular expression ({error}); '
                         "for any characters write '.*'") from None


def _examples(names) -> str:
    return 'such as ' + ', '.join(map(repr, list(names)[:5]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode back.

    `model.train()` would not do: it also unfreezes norms that are kept in evaluation.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
