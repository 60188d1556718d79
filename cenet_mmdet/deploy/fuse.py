"""`fuse_ce`: a trained model made ready for inference."""
from typing import Dict, List

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import CE
from ..models.insert import NormCE
from .convolution import fold
from .pairs import Pair, pairs


def fuse_ce(model: nn.Module) -> nn.Module:
    """Fold batch norms and CE into the convolutions in front of them, in place.

    The model then computes what it did in evaluation mode, up to rounding, and can be
    used for inference only; its state dict is another one. Plain pairs of convolution and
    batch norm are folded too. It works on the package's backbones, on networks with CE
    as a plugin of MMDetection's ResNet, and on what `insert_ce` made, where the parent
    of the layers is an `nn.Sequential`, an MMCV `ConvModule` or names them as ResNets do.

    Args:
        model: a network in evaluation mode, on any device, in any floating point type.

    Returns:
        The model.

    Raises:
        ValueError: if a CE layer cannot be folded, because it or its norm is in training
            mode, its statistics were never set, its norm is no batch norm, or no
            convolution is found in front of it. The message names all such layers;
            the model is left as it was.
    """
    found = [pair for pair in pairs(model) if pair.ce is not None or _is_plain(pair)]
    problems = _problems(model, found)
    if problems:
        raise ValueError('these layers cannot be folded: ' + '; '.join(
            f'{name} ({why})' for name, why in problems.items()))
    for pair in found:
        parent, name = pair.conv
        conv = parent._modules[name]
        setattr(parent, name, fuse_conv_bn_eval(conv, pair.norm) if pair.ce is None
                else fold(conv, pair.norm, pair.ce))
        for parent, name in pair.emptied:
            setattr(parent, name, nn.Identity())
    return model


def _is_plain(pair: Pair) -> bool:
    """Whether a pair without CE can be folded; if not, it stays as it is."""
    return (_is_convolution(pair) and _is_batch_norm(pair.norm)
            and not (pair.norm.training or pair.conv[0]._modules[pair.conv[1]].training))


def _problems(model: nn.Module, found: List[Pair]) -> Dict[str, str]:
    """Why CE layers cannot be folded, by their names."""
    by_ce = {id(pair.ce): pair for pair in found if pair.ce is not None}
    problems = {}
    for name, ce in model.named_modules():
        if isinstance(ce, NormCE) and ce.before:
            problems[f'{name}.ce'] = 'CE stands before its norm'
        if isinstance(ce, CE) and name not in problems:
            why = _problem(ce, by_ce.get(id(ce)))
            if why:
                problems[name or type(ce).__name__] = why
    return problems


def _problem(ce: CE, pair) -> str:
    if pair is None:
        return 'no convolution and norm were found in front of it'
    if not _is_convolution(pair):
        return f'{type(pair.conv[0]._modules[pair.conv[1]]).__name__} {pair.name} is no nn.Conv2d'
    if not _is_batch_norm(pair.norm):
        return (f'its norm is a {type(pair.norm).__name__}; only batch norms with running '
                'statistics can be folded')
    if ce.training or pair.norm.training:
        return 'it or its norm is in training mode; call model.eval() first'
    if not ce.num_batches_tracked:
        return 'its statistics were never trained or loaded; load a checkpoint first'
    return ''


def _is_convolution(pair: Pair) -> bool:
    conv = pair.conv[0]._modules[pair.conv[1]]
    return isinstance(conv, nn.Conv2d) and type(conv).forward is nn.Conv2d.forward


def _is_batch_norm(norm: nn.Module) -> bool:
    return (isinstance(norm, _BatchNorm) and norm.running_mean is not None
            and not hasattr(norm, 'act'))  # timm's have their activation inside
