"""`fuse_ce`: a trained model made ready for inference."""
import copy
from typing import Any, Dict, List, Set, Tuple

from torch import Tensor, nn

from ..models.insert import NormCE, activation_of, replace_modules
from ..utils.errors import InputError, first_line
from .compare import TOLERANCE, deviation, first_difference, run, tensors
from .convolution import fold
from .tracing import trace


def fuse_ce(model: nn.Module, example: Any) -> nn.Module:
    """Fold batch norms and CE into the layers in front of them, in place (section 3.1).

    The model, which is returned, then computes what it did in evaluation mode, up to rounding. It
    can be used for inference only, and its state dict is another one. Any network will do: copies
    run on the example, to see which layers follow each other and to compare the results.

    CE and its norm are folded into the convolution or linear layer in front of them. If there is
    none, or its output is also used elsewhere, they become one step behind it. Batch norms
    without CE are folded too, where that is exact. Layers that the example does not reach stay.

    Args:
        model: in evaluation mode, in float32 or float64. Convert it to half precision afterwards.
        example: input on the model's device: a tensor, or a tuple or dict of arguments. The output
            must be the same each time, and hold tensors in lists, tuples or dicts.

    Raises:
        InputError: a CE layer cannot be folded: it or its norm is in training mode, its statistics
            were never set, its norm is no batch norm, or something else reads the norm's output.
            Or the output deviates by more than 1e-10 of its largest value (float32: 1e-4). The
            message names the layers, and the model is left as it was.
    """
    tolerance = _tolerance(model)
    twin = _copied(model)
    pairs = list(zip(model.modules(), twin.modules()))
    names = {module: name or 'the model' for name, module in twin.named_modules()}
    output, chains, problems = trace(twin, example, tolerance)
    if problems:
        raise InputError('these layers cannot be folded: ' + '; '.join(
            f'{", ".join(names[ce] for ce in problems if problems[ce] == why)} ({why})'
            for why in dict.fromkeys(problems.values())))
    expected = [tensor.clone() for tensor in tensors(output)]
    folded = _folded(chains)
    twin = replace_modules(twin, folded)
    inside = {names.get(module) for layer, norm, *_ in chains for module in (layer, norm)}
    _compare(model, twin, example, expected, inside, tolerance)
    return replace_modules(model, {module: folded[copied] for module, copied in pairs
                                   if copied in folded})


def _tolerance(model: nn.Module) -> float:
    if model.training:
        raise InputError('the model is in training mode; call model.eval() first')
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if types - TOLERANCE.keys():
        raise InputError('fuse_ce needs float32 or float64: fold before converting to another type')
    return max(map(TOLERANCE.get, types), default=0.)


def _copied(model: nn.Module) -> nn.Module:
    # The older kind of weight norm keeps a computed weight, which deepcopy refuses.
    computed = {id(value): value.detach().clone() for module in model.modules()
                for value in vars(module).values() if isinstance(value, Tensor)}
    return copy.deepcopy(model, computed)


def _folded(chains: List[Tuple]) -> Dict[nn.Module, nn.Module]:
    """What replaces the modules of the chains."""
    folded = {}
    for layer, norm, batch_norm, ce in chains:
        if layer is not None:
            folded[layer] = fold(layer, batch_norm, ce)
            folded[norm] = activation_of(norm) or nn.Identity()
        else:
            folded[norm] = NormCE(batch_norm, ce)  # computes both in one step
        if ce is not None:
            folded[ce] = nn.Identity()
    return {module: replacement.eval() for module, replacement in folded.items()}


def _compare(model: nn.Module, folded: nn.Module, example: Any, expected: List[Tensor],
             inside: Set[str], tolerance: float) -> None:
    """An InputError if the folded model's output is not the expected one."""
    if not expected:
        raise InputError("fuse_ce compares outputs, but the model's output for the example holds "
                         'no tensor in a list, tuple or dict')
    try:
        found = list(tensors(run(folded, example)))
    except Exception as error:
        raise InputError(f'the folded model does not run ({first_line(error)}); the model is left '
                         'as it was') from error
    whole = deviation(found, expected)
    if not whole <= tolerance:
        name, difference = first_difference(_copied(model), folded, example, inside,
                                            tolerance) or ('the model', whole)
        raise InputError(
            f'the folded model computes something else: the first output that differs is that of '
            f'{name}, by {difference:.1e} of its largest value; the model is left as it was. In '
            'float32, rounding can change what a network selects, such as detections: fold '
            'model.double()')
