"""CE in networks that know nothing of it: behind the normalization layers that one selects."""
import re
from typing import Any, Callable, Dict, List, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..layers import CE, SyncCE
from ..layers.fused import batch_norm_ce
from ..utils.errors import InputError

# A regular expression that the whole dotted name matches, or a function of name and layer.
Selector = Union[str, Callable[[str, nn.Module], bool]]

NORMS = (_NormBase, nn.GroupNorm)  # batch (synchronized or not), instance and group norm
# Frozen batch norms, of any library, hold these tensors.
FROZEN = ('weight', 'bias', 'running_mean', 'running_var')


class NormCE(nn.Module):
    """A norm with CE, or another layer, behind it; it takes the norm's place.

    State dicts of the network without CE still load: `bn1.weight` is read as `bn1.norm.weight`. The
    norm's attributes are at `bn1.norm` only, as code that folds `bn1.weight` would leave out CE.

    Args:
        norm: the normalization layer.
        ce: what follows it.
        before: let it precede the norm instead, for the paper's ablation.
        act: what follows both.
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
        """Initialize CE, unless it was trained or loaded; MMEngine calls this.

        `zero_init_residual` has set all weights in the norm's place to 0, from which the IR
        subnetwork cannot learn.
        """
        if isinstance(self.ce, CE) and not self.ce.num_batches_tracked:
            self.ce.reset_parameters()

    def train(self, mode: bool = True) -> 'NormCE':
        self._freeze()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> 'NormCE':
        self._freeze()  # MMEngine moves a model to its device before it is wrapped
        return super()._apply(*args, **kwargs)

    def _freeze(self) -> None:
        # MMCV sets requires_grad of all parameters of a norm once it is built, and so of CE's.
        if isinstance(self.ce, CE):
            self.ce.freeze_parameters()

    def extra_repr(self) -> str:
        return f'before={self.before}'

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any,
                              **kwargs: Any) -> None:
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
    of (N, C, H, W), of any library. If a norm has an activation of its own (timm's
    `BatchNormAct2d`), CE comes between the two.

    Args:
        model: the network, changed in place and returned, or a norm, whose replacement is returned.
            Checkpoints without CE still load; CE adds the entries `<name of the norm>.ce.*`.
        where: a regular expression that must match the whole dotted name of a norm, such as
            `r'layer[123]\\.\\d+\\.bn3'`; or a function of the name and the layer.
        ce_cfg: arguments of the CE layers. `type` is CE unless given; it may be a class, or name a
            layer in MMEngine's registry, whose first argument is the number of channels.
        before: put CE before the norms instead, for the paper's ablation (section 5.3).

    Raises:
        InputError: `where` selects no norm, or a layer norm over the last dimension. The message
            lists the norms that CE can follow.
    """
    replaced: Dict[nn.Module, nn.Module] = {}
    for norm in dict.fromkeys(map(model.get_submodule, selected_norms(model, where))):
        layer, activation = build_layer(ce_cfg, channels_of(norm)), activation_of(norm)
        if activation is not None:  # conversions to SyncBN lose what a norm holds besides
            norm.drop, norm.act = nn.Identity(), nn.Identity()
        replaced[norm] = NormCE(norm, layer, before, activation)
    return replace_modules(model, replaced)


def selected_norms(model: nn.Module, where: Selector) -> List[str]:
    """Dotted names of the norms that `where` selects; raises as `insert_ce` does."""
    inside = tuple(f'{name}.' if name else '' for name, module in model.named_modules()
                   if isinstance(module, (NormCE, CE)))
    norms = {name: module for name, module in model.named_modules()
             if is_norm(module) and not name.startswith(inside)}
    selects = where if callable(where) else lambda name, _: re.fullmatch(where, name)
    names = [name for name, norm in norms.items() if selects(name, norm)]
    over_last = [name for name in names if channels_of(norms[name]) is None]
    if names and not over_last:
        return names
    what = 'the function `where`' if callable(where) else f'where={where!r}'
    problem = (f'selects {", ".join(over_last)}: normalization over the last dimension, while CE '
               'needs the channels in dimension 1. Leave these out' if over_last
               else 'selects no normalization layer')
    found = ', '.join(name for name, norm in norms.items() if channels_of(norm) is not None)
    raise InputError(f'{what} {problem}. There are: '
                     f'{found or "none, the network has no norm that CE can follow"}')


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer, of any library."""
    return (isinstance(module, NORMS) or hasattr(module, 'normalized_shape')
            or all(isinstance(getattr(module, name, None), Tensor) for name in FROZEN))


@torch.no_grad()
def channels_of(norm: Any) -> Optional[int]:
    """C, the size of dimension 1 of what a norm takes; None for one over the last dimension."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if not hasattr(norm, 'normalized_shape'):
        return norm.num_features if hasattr(norm, 'num_features') else len(norm.running_mean)
    # The class of a layer norm does not tell which dimension it takes: it is tried.
    channels = norm.normalized_shape[0]
    weight = torch.empty(0) if norm.weight is None else norm.weight
    try:
        norm(weight.new_zeros(1, channels, 1, 3 if channels == 2 else 2))
    except Exception:  # whatever it raises, it cannot take (N, C, H, W)
        return None
    return channels


def activation_of(norm: nn.Module) -> Optional[nn.Module]:
    """What a norm does to its output, as timm's norms with an activation do; None for nothing."""
    layers = [layer for layer in (getattr(norm, 'drop', None), getattr(norm, 'act', None))
              if isinstance(layer, nn.Module) and not isinstance(layer, nn.Identity)]
    return nn.Sequential(*layers) if len(layers) > 1 else next(iter(layers), None)


def build_layer(cfg: Optional[Dict], channels: int) -> nn.Module:
    """The layer that `cfg` describes, CE unless its `type` says otherwise."""
    cfg = dict(cfg or {})
    kind = cfg.pop('type', 'CE')
    layer = {'CE': CE, 'SyncCE': SyncCE}.get(kind, kind)
    if isinstance(layer, str):
        from mmengine.registry import MODELS  # the layers above need torch alone
        with MODELS.switch_scope_and_registry(None) as registry:
            layer = registry.get(kind)
        if layer is None:
            raise ValueError(f'ce_cfg: no layer {kind!r} in the registry; use CE or SyncCE, or '
                             'register it')
    return layer(channels, **cfg)


def replace_modules(model: nn.Module, replaced: Dict[nn.Module, nn.Module]) -> nn.Module:
    """The model with its submodules exchanged, wherever they are referred to."""
    for parent in list(model.modules()):  # without what is put in
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model)
