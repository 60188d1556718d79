"""CE in networks that know nothing of it: behind the normalization layers that one selects."""
import re
from typing import Callable, Dict, List, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..layers import CE, SyncCE
from ..layers.fused import batch_norm_ce
from ..utils.errors import InputError

# A regular expression that the whole dotted name matches, or a function of name and layer.
Selector = Union[str, Callable[[str, nn.Module], bool]]

LAYERS = {'CE': CE, 'SyncCE': SyncCE}
NORMS = (_NormBase, nn.GroupNorm)  # batch (synchronized or not), instance and group norm
FROZEN = ('weight', 'bias', 'running_mean', 'running_var')


class NormCE(nn.Module):
    """A normalization layer with another layer, CE as a rule, behind it.

    It takes the place of the normalization layer. State dicts of the network without CE still
    load: `bn1.weight` is read as `bn1.norm.weight`. The attributes of the norm (`bn1.weight`,
    `bn1.eps`) are found at `bn1.norm` only: code that reads them, such as a function that folds
    batch norms into convolutions, would leave CE out without a word.

    Args:
        norm: the normalization layer.
        ce: what follows it.
        before: let it precede the norm instead, for the paper's ablation.
        act: what the norm did to its output, if it has an activation of its own.
    """

    def __init__(self, norm: nn.Module, ce: nn.Module, before: bool = False,
                 act: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.norm = norm
        self.ce = ce
        self.before = before
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.ce(x)) if self.before else batch_norm_ce(self.norm, self.ce, x)
        return x if self.act is None else self.act(x)

    def init_weights(self) -> None:
        """Undo what an initialization meant for the norm did to CE; MMEngine calls this after it.

        `zero_init_residual` sets all weights found in the norm's place to 0, from which the IR
        subnetwork cannot learn. A CE layer that was trained or loaded keeps its weights.
        """
        if isinstance(self.ce, CE) and not self.ce.num_batches_tracked:
            self.ce.reset_parameters()
        self._freeze()

    def train(self, mode: bool = True) -> 'NormCE':
        super().train(mode)
        self._freeze()
        return self

    def _apply(self, *args, **kwargs) -> 'NormCE':
        super()._apply(*args, **kwargs)
        self._freeze()  # MMEngine moves a model to its device before it is wrapped
        return self

    def _freeze(self) -> None:
        # MMCV sets requires_grad of all parameters of a norm once it is built, and so of CE's.
        if getattr(self.ce, 'freeze', 'none') != 'none':
            self.ce.requires_grad_(False)

    def extra_repr(self) -> str:
        return 'ce first' if self.before else ''

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Entries that are not of one of these layers are the norm's, from a network without CE.
        ours = tuple(f'{prefix}{name}.' for name in self._modules)
        for key in list(state_dict):
            if key.startswith(prefix) and not key.startswith(ours):
                state_dict[f'{prefix}norm.{key[len(prefix):]}'] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def insert_ce(model: nn.Module, where: Selector, ce_cfg: Optional[Dict] = None,
              before: bool = False) -> nn.Module:
    """Put CE behind the selected normalization layers of any network.

    These are batch, instance and group norms, frozen batch norms, and layer norms over the channels
    of (N, C, H, W), whichever library they are from. If a norm has an activation of its own (timm's
    `BatchNormAct2d`), CE comes between the two.

    Args:
        model: the network, changed in place. Checkpoints of the network without CE still load;
            each CE layer adds the entries `<name of the norm>.ce.*`.
        where: the dotted names of the norms, as a regular expression that must match all of the
            name, such as `r'layer[123]\\.\\d+\\.bn3'`; or a function of the name and the layer that
            says whether to take it.
        ce_cfg: arguments of the CE layers, `type` is CE unless given. `type` may also name any
            layer in MMEngine's registry, or be a class, whose first argument is the number of
            channels.
        before: put CE before the norms instead, for the paper's ablation.

    Returns:
        The model, or what replaces it where the model itself is a norm.

    Raises:
        InputError: `where` selects no norm, or a layer norm over the last dimension. The message
            lists the norms that CE can follow.
    """
    names = selected_norms(model, where)
    replaced = {}
    for name in names:
        norm = model.get_submodule(name)
        if norm not in replaced:
            layer = build_layer(ce_cfg, channels_of(norm))
            replaced[norm] = NormCE(norm, layer, before, take_activation(norm))
    return replace_modules(model, replaced)


def selected_norms(model: nn.Module, where: Selector) -> List[str]:
    """Dotted names of the norms that `where` selects; `insert_ce` has the errors raised."""
    inside = tuple(f'{name}.' if name else '' for name, module in model.named_modules()
                   if isinstance(module, (NormCE, CE)))
    norms = {name: module for name, module in model.named_modules()
             if is_norm(module) and not name.startswith(inside)}
    selects = where if callable(where) else lambda name, _: re.fullmatch(where, name)
    names = [name for name, module in norms.items() if selects(name, module)]
    over_last = [name for name in names if channels_of(norms[name]) is None]
    if names and not over_last:
        return names
    what = 'the function `where`' if callable(where) else f'where={where!r}'
    problem = 'selects no normalization layer'
    if over_last:
        problem = (f'selects {", ".join(over_last)}: normalization over the last dimension, while '
                   'CE needs the channels in dimension 1. Leave these out')
    found = [name for name, module in norms.items() if channels_of(module) is not None]
    raise InputError(f'{what} {problem}. There are: '
                     + (', '.join(found) or 'none, the network has no norm that CE can follow'))


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer, of any library."""
    return isinstance(module, NORMS) or is_frozen(module) or hasattr(module, 'normalized_shape')


def is_frozen(module: nn.Module) -> bool:
    """Whether it is a frozen batch norm, of any library: they hold the same four buffers."""
    return not isinstance(module, NORMS) and all(
        isinstance(getattr(module, name, None), Tensor) for name in FROZEN)


def channels_of(norm: nn.Module) -> Optional[int]:
    """C, the size of dimension 1 of what a norm takes; None for one over the last dimension."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if hasattr(norm, 'normalized_shape'):
        return _channels_of_layer_norm(norm)
    return len(norm.running_mean) if is_frozen(norm) else norm.num_features


@torch.no_grad()
def _channels_of_layer_norm(norm: nn.Module) -> Optional[int]:
    # Its class does not tell which dimension a layer norm takes: it is tried.
    try:
        channels = norm.normalized_shape[0]
        weight = torch.empty(0) if norm.weight is None else norm.weight
        norm(weight.new_zeros(1, channels, 1, 3 if channels == 2 else 2))
    except Exception:  # whatever it raises, it cannot take (N, C, H, W)
        return None
    return channels


def activation_of(norm: nn.Module) -> Optional[nn.Module]:
    """What a norm does to its output, as timm's norms with an activation do; None for nothing."""
    layers = [getattr(norm, name, None) for name in ('drop', 'act')]
    layers = [layer for layer in layers
              if isinstance(layer, nn.Module) and not isinstance(layer, nn.Identity)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers) if layers else None


def take_activation(norm: nn.Module) -> Optional[nn.Module]:
    """`activation_of` the norm, which then has none.

    Conversions to SyncBN make a new norm of the old one and lose what it held besides.
    """
    activation = activation_of(norm)
    if activation is not None:
        norm.drop, norm.act = nn.Identity(), nn.Identity()
    return activation


def build_layer(cfg: Optional[Dict], channels: int) -> nn.Module:
    """The layer that `cfg` describes, CE unless its `type` says otherwise."""
    cfg = dict(cfg or {})
    layer = cfg.pop('type', 'CE')
    if isinstance(layer, str) and layer not in LAYERS:
        from mmengine.registry import MODELS  # the layers above need torch alone
        with MODELS.switch_scope_and_registry(None) as registry:
            name, layer = layer, registry.get(layer)
        if layer is None:
            raise ValueError(f'ce_cfg: no layer {name!r} in the registry; '
                             f'use one of {", ".join(LAYERS)} or register it')
    return LAYERS.get(layer, layer)(channels, **cfg)


def replace_modules(module: nn.Module, replaced: Dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with its submodules exchanged, wherever they are referred to."""
    new = set(replaced.values())
    # not named_children(), which leaves out the second name of a shared layer
    for name, child in module._modules.items():
        if child is not None and child not in new:
            setattr(module, name, replace_modules(child, replaced))
    return replaced.get(module, module)
