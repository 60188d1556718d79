"""CE in networks that know nothing of it: behind the normalization layers that one selects."""
import re
from typing import Callable, Dict, Optional, Union

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..layers import CE, SyncCE
from ..layers.fused import batch_norm_ce

# A regular expression that the whole dotted name matches, or a function of name and layer.
Selector = Union[str, Callable[[str, nn.Module], bool]]

LAYERS = {'CE': CE, 'SyncCE': SyncCE}
NORMS = (_NormBase, nn.GroupNorm)  # batch (synchronized or not), instance and group norm


class NormCE(nn.Module):
    """A normalization layer with another layer, CE as a rule, behind it.

    Stands where the normalization layer stood. State dicts of the network as
    it was before load as they are: `bn1.weight` is read as `bn1.norm.weight`.

    Args:
        norm: the normalization layer.
        ce: what follows it.
        before: let it precede the norm instead, for the paper's ablation.
    """

    def __init__(self, norm: nn.Module, ce: nn.Module, before: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.ce = ce
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.ce(x)) if self.before else batch_norm_ce(self.norm, self.ce, x)

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

    def _freeze(self) -> None:
        # MMCV sets requires_grad of all parameters of a norm once it is built, and so of CE's.
        if getattr(self.ce, 'freeze', 'none') != 'none':
            self.ce.requires_grad_(False)

    def extra_repr(self) -> str:
        return 'ce first' if self.before else ''

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name in self.norm.state_dict():
            if prefix + name in state_dict:
                state_dict[f'{prefix}norm.{name}'] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def insert_ce(model: nn.Module, where: Selector, ce_cfg: Optional[Dict] = None,
              before: bool = False) -> nn.Module:
    """Put CE behind the selected normalization layers of any network.

    Args:
        model: the network, changed in place. Checkpoints of it as it was still
            load; each CE layer adds the entries `<name of the norm>.ce.*`.
        where: the dotted names of the norms, as a regular expression that must
            match all of the name, such as `r'layer[123]\\.\\d+\\.bn3'`; or a
            function of the name and the layer that says whether to take it.
        ce_cfg: arguments of the CE layers, `type` is CE unless given. `type`
            may also name any layer in MMEngine's registry, or be a class, whose
            first argument is the number of channels.
        before: put CE before the norms instead, for the paper's ablation.

    Returns:
        The model, or what replaces it where the model itself is a norm.

    Raises:
        ValueError: if `where` selects no norm; the message lists those there are.

    Norms with an activation of their own (timm's `BatchNormAct2d`) get CE
    between the two.
    """
    names = selected_norms(model, where)
    replaced = {}
    for name in names:
        norm = model.get_submodule(name)
        if id(norm) not in replaced:
            layer = build_layer(ce_cfg, channels_of(norm))
            replaced[id(norm)] = _with_layer(norm, layer, before)
    return _replace(model, replaced)


def selected_norms(model: nn.Module, where: Selector):
    """Dotted names of the norms that `where` selects; a ValueError if it selects none."""
    inside = tuple(f'{name}.' if name else '' for name, module in model.named_modules()
                   if isinstance(module, NormCE))
    norms = {name: module for name, module in model.named_modules()
             if isinstance(module, NORMS) and not name.startswith(inside)}
    selects = where if callable(where) else lambda name, _: re.fullmatch(where, name)
    names = [name for name, module in norms.items() if selects(name, module)]
    if not names:
        what = 'the function `where`' if callable(where) else f'where={where!r}'
        found = ', '.join(norms) or 'none, the network has no batch, instance or group norm'
        raise ValueError(f'{what} selects no normalization layer. There are: {found}')
    return names


def channels_of(norm: nn.Module) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


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


def _with_layer(norm: nn.Module, layer: nn.Module, before: bool) -> nn.Module:
    activation = getattr(norm, 'act', None)
    if before or activation is None or isinstance(activation, nn.Identity):
        return NormCE(norm, layer, before)
    norm.act = nn.Sequential()
    norm.act.add_module('ce', layer)
    norm.act.add_module('act', activation)
    return norm


def _replace(module: nn.Module, replaced: Dict[int, nn.Module]) -> nn.Module:
    """The module with its submodules exchanged, wherever they are referred to."""
    # not named_children(), which leaves out the second name of a shared layer
    for name, child in module._modules.items():
        if child is not None and id(child) not in map(id, replaced.values()):
            setattr(module, name, _replace(child, replaced))
    return replaced.get(id(module), module)
