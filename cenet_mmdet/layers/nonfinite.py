"""Samples with inf or NaN: no part of any statistics, and told of once.

One such sample would spoil the running statistics for good, and through the covariance
every other sample of its batch. Its own output stays inf or NaN, so a gradient scaler
still sees it.
"""
import sys
import warnings
from typing import Optional
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from ..compat import is_compiling

# Batches from one look to the next, by the kind of device: each look waits for a GPU.
LOOK_EVERY = {'cpu': 1, 'cuda': 100}

_told = WeakSet()  # layers, and networks they are in
_left_out = WeakKeyDictionary()  # layer -> batches since the last look, pixels left out


def nonfinite_samples(variance: Tensor) -> Tensor:
    """Which samples have an inf or NaN: variances (N, G, d) -> (N, ) bool.

    No sum of squared deviations from a mean is finite that has one in it.
    """
    return ~variance.sum((1, 2)).isfinite()


def tell_of_left_out(layer: nn.Module, left_out: Tensor) -> None:
    """Warn once for each network, naming the first layer that left samples out.

    Args:
        layer: the layer that did, if it did.
        left_out: how many pixels these samples have, a scalar tensor.
    """
    if is_compiling() or layer in _told:
        return
    batches, before = _left_out.get(layer, (0, left_out.new_zeros(())))
    left_out = left_out + before.to(left_out.device)  # the layer may have been moved
    every = LOOK_EVERY.get(left_out.device.type, LOOK_EVERY['cuda'])
    _left_out[layer] = (batches + 1) % every, left_out
    if batches == 0 and left_out:
        _told.add(layer)
        _warn(layer)


def _warn(layer: nn.Module) -> None:
    network = _running_network(layer)
    name = type(layer).__name__
    if network is not None:
        if network in _told:
            return
        _told.add(network)
        path = next(path for path, module in network.named_modules() if module is layer)
        name = f'{path} ({name})'
    warnings.warn(f'{name}: samples with inf or NaN are left out of its statistics; their own '
                  'output stays inf or NaN. Look for the cause in front of this layer: the '
                  'learning rate, the images, half precision', stacklevel=2)


def _running_network(layer: nn.Module) -> Optional[nn.Module]:
    """The outermost of the modules around the layer whose forward is running now.

    Modules do not know what they are part of; their callers do.
    """
    network, frame = None, sys._getframe()
    while frame:
        caller = frame.f_locals.get('self')
        if (isinstance(caller, nn.Module) and caller is not layer
                and any(module is layer for module in caller.modules())):
            network = caller
        frame = frame.f_back
    return network
