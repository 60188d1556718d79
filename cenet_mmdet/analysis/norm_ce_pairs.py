"""Which norm a CE layer follows, seen while the network runs: CE gets the norm's own tensor."""
from functools import partial
from typing import Any, Callable, Dict

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from .modules import ce_layers, evaluating, norms


def mark(output: Tensor, origin: Any) -> None:
    """Note on a norm's output where it comes from."""
    if output.is_inference():
        raise InputError('the model runs under torch.inference_mode(), which hides whether a '
                         'rectifier changed the output of a norm in place; use torch.no_grad()')
    output.norm_origin = origin, output._version


def origin_of(x: Tensor) -> Any:
    """What `mark` noted; None if x is no norm's output or a rectifier changed it in place."""
    origin, version = getattr(x, 'norm_origin', (None, None))
    return origin if origin is not None and version == x._version else None


def norm_ce_pairs(model: nn.Module, run: Callable[[], object]) -> Dict[str, str]:
    """Names of the norms that CE follows directly, and of these CE layers.

    A CE layer behind a rectifier, or in front of its norm, is in no pair.

    Args:
        model: any network; in evaluation mode and without gradients during `run`.
        run: calls the model once, such as `lambda: model(images)`; one image is enough.

    Returns:
        {name of the norm: name of the CE layer}, in the order of calls; empty without CE.

    Raises:
        InputError: there are CE layers and `run` calls none, or uses inference_mode.
    """
    found, called = {}, []

    def after_norm(name, norm, inputs, output):
        mark(output, name)

    def before_ce(name, ce, inputs):
        called.append(name)
        norm = origin_of(inputs[0])
        if norm is not None:
            found[norm] = name

    layers, followed = ce_layers(model), norms(model)
    if not layers:
        return {}
    handles = [norm.register_forward_hook(partial(after_norm, name))
               for name, norm in followed.items()]
    handles += [ce.register_forward_pre_hook(partial(before_ce, name))
                for name, ce in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise InputError(f'run() called none of the {len(layers)} CE layers; '
                         'it must call the model, as in `lambda: model(images)`')
    return found
