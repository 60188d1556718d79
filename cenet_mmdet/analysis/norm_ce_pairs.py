"""Which norm a CE layer follows, seen while the network runs.

Modules do not tell in which order they are called, but at run time it is plain: CE gets the
very tensor that the norm returned. That holds for every network, whoever wrote it.
"""
from functools import partial
from typing import Any, Callable, Dict

import torch
from torch import Tensor, nn

from .modules import ce_layers, evaluating, norms


def mark(output: Tensor, origin: Any) -> None:
    """Note on a norm's output where it comes from."""
    if output.is_inference():
        raise ValueError('the model runs under torch.inference_mode(), which hides whether a '
                         'rectifier changed the output of a norm in place; use torch.no_grad()')
    output.norm_origin = origin, output._version


def origin_of(x: Tensor) -> Any:
    """What `mark` noted, or None if x is no norm's output or was changed in place since.

    The latter is what `nn.ReLU(inplace=True)` does: the tensor is the same, its values not.
    """
    if not hasattr(x, 'norm_origin'):
        return None
    origin, version = x.norm_origin
    return origin if version == x._version else None


def norm_ce_pairs(model: nn.Module, run: Callable[[], object]) -> Dict[str, str]:
    """Names of the norms that CE follows directly, and of these CE layers.

    A CE layer behind a rectifier, or in front of its norm, is in no pair. Works for blocks,
    stems, plugins and inserted layers alike; the names stay true as long as the network has
    the same layers.

    Args:
        model: any network; it is in evaluation mode during `run`, and without gradients.
        run: calls the model once, such as `lambda: model(images)`; one image is enough.

    Returns:
        {name of the norm: name of the CE layer}, in the order of calls; empty without CE.

    Raises:
        ValueError: if there are CE layers and `run` calls none, or uses inference_mode.
    """
    layers = ce_layers(model)
    if not layers:
        return {}
    found, called = {}, set()

    def after_norm(name, norm, inputs, output):
        mark(output, name)

    def before_ce(name, ce, inputs):
        called.add(name)
        norm = origin_of(inputs[0]) or surrounding.get(name)
        if norm is not None:
            found[norm] = name

    # A norm with an activation of its own (timm) has CE inside it, see `insert_ce`.
    surrounding = {ce: norm for norm in norms(model) for ce in layers if ce.startswith(f'{norm}.')}
    handles = [norm.register_forward_hook(partial(after_norm, name))
               for name, norm in norms(model).items()]
    handles += [ce.register_forward_pre_hook(partial(before_ce, name))
                for name, ce in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError(f'run() called none of the {len(layers)} CE layers; '
                         'it must call the model, as in `lambda: model(images)`')
    return found
