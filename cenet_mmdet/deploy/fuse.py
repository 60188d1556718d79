"""`fuse_ce`: a trained model made ready for inference."""
import copy
from typing import Any, Dict, List, Set

from torch import Tensor, nn

from ..models.insert import NormCE, activation_of, replace_modules
from ..utils.errors import InputError, first_line
from .compare import TOLERANCE, deviation, outputs_by_module, run, tensors
from .convolution import fold
from .tracing import trace


def fuse_ce(model: nn.Module, example: Any) -> nn.Module:
    """Fold batch norms and CE into the layers in front of them, in place (section 3.1).

    The model, which is returned, then computes what it did in evaluation mode, up to rounding. It
    is for inference only, and its state dict is another one. Any network will do: copies run on
    the example, to see which layers follow each other and to compare the results.

    CE and its norm are folded into the convolution or linear layer in front of them. If there is
    none, or its output is also used elsewhere, they become one step behind it. Batch norms
    without CE are folded too, where that is exact. Layers that the example does not reach stay.

    Args:
        model: in evaluation mode, in float32 or float64. Convert it to half precision afterwards.
        example: input on the model's device: a tensor, or a tuple or dict of arguments. The output
            must be the same each time, and hold tensors in lists, tuples or dicts.

    Raises:
        InputError: a CE layer cannot be folded, for a reason that the message gives, or the output
            deviates by more than 1e-10 of its largest value (float32: 1e-4). The model is left as
            it was.
    """
    if model.training:
        raise InputError('the model is in training mode; call model.eval() first')
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if types - TOLERANCE.keys():
        raise InputError('fuse_ce needs float32 or float64: fold before converting to another type')
    tolerance = max(map(TOLERANCE.__getitem__, types), default=0.)
    twin = _copied(model)
    pairs = list(zip(model.modules(), twin.modules()))
    names = {module: name for name, module in twin.named_modules()}
    output, chains = trace(twin, example, tolerance)
    expected = [tensor.clone() for tensor in tensors(output)]
    folded: Dict[nn.Module, nn.Module] = {}
    for layer, norm, batch_norm, ce in chains:
        if layer is None:
            folded[norm] = NormCE(batch_norm, ce).eval()  # computes both in one step
        else:
            folded[layer] = fold(layer, batch_norm, ce).eval()
            folded[norm] = (activation_of(norm) or nn.Identity()).eval()
        if ce is not None:
            folded[ce] = nn.Identity().eval()
    inside = {names.get(module) for layer, norm, *_ in chains for module in (layer, norm)}
    _compare(model, replace_modules(twin, folded), example, expected, inside, tolerance)
    return replace_modules(model, {module: folded[copied] for module, copied in pairs
                                   if copied in folded})


def _copied(model: nn.Module) -> nn.Module:
    # The older kind of weight norm keeps a computed weight, which deepcopy refuses.
    computed = {id(value): value.detach().clone() for module in model.modules()
                for value in vars(module).values() if isinstance(value, Tensor)}
    return copy.deepcopy(model, computed)


def _compare(model: nn.Module, folded: nn.Module, example: Any, expected: List[Tensor],
             inside: Set[str], tolerance: float) -> None:
    """Refuse other outputs, naming the first of the modules not `inside` that deviates."""
    if not expected:
        raise InputError("fuse_ce compares outputs, but the model's output for the example holds "
                         'no tensor in a list, tuple or dict')
    try:
        output = run(folded, example)
    except Exception as error:
        raise InputError(f'the folded model does not run ({first_line(error)}); the model is left '
                         'as it was') from error
    whole = deviation(list(tensors(output)), expected)
    if not whole <= tolerance:
        before, after = (outputs_by_module(m, example) for m in (_copied(model), folded))
        found = {name: deviation(after[name], before[name]) for name in before
                 if name in after and name not in inside}
        name = next((name for name in found if not found[name] <= tolerance), 'the model')
        raise InputError(
            f'the folded model computes something else: the first output that differs is that of '
            f'{name}, by {found.get(name, whole):.1e} of its largest value; the model is left as '
            'it was. In float32, rounding can change what a network selects, such as detections: '
            'fold model.double()')
