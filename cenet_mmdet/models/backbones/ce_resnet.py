"""ResNet with Channel Equilibrium layers; everything else is MMDetection's ResNet."""
import logging
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.fused import batch_norm_ce
from ..insert import build_layer
from .ce_network import CENetwork

# The released ResNet-50 whitens all 64 channels of the stem in one group.
STEM_GROUP_SIZE = 64
POSITIONS = ('last', 'second')
# Stages whose blocks carry a CE layer unless `ce_blocks` says otherwise. The places in the blocks
# of 18 and 101 are the paper's, those of 50 the released code's. The paper has no 34 and no 152:
# 34 follows 18 (same blocks), 152 follows 101 (layer1 and layer2). CE in the stem is the released
# 50's; the paper does not mention it.
DEFAULT_STAGES = {
    18: (True, True, True, True),
    34: (True, True, True, True),
    50: (True, True, True, False),
    101: (True, True, False, False),
    152: (True, True, False, False),
}


class _CEBlock(nn.Module):
    """What both blocks share: a CE layer behind the norm named `ce_norm`, if there is one."""
    last_norm: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module('ce', None)
        self.ce_norm = self.last_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            out = checkpoint(self._residual, x, use_reentrant=False)
        else:
            out = self._residual(x)
        return self.relu(out)

    def _normalize(self, name: str, x: Tensor) -> Tensor:
        """The norm of this name, and CE if it follows it."""
        norm = getattr(self, name)
        if self.ce is None or name != self.ce_norm:
            return norm(x)
        return batch_norm_ce(norm, self.ce, x)

    def _add_identity(self, out: Tensor, x: Tensor) -> Tensor:
        out += x if self.downsample is None else self.downsample(x)
        return out


class CEBasicBlock(_CEBlock, BasicBlock):
    """BasicBlock with CE after its second norm, which is the last."""
    last_norm = 'norm2'

    def _residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self._normalize('norm2', self.conv2(out))
        return self._add_identity(out, x)


class CEBottleneck(_CEBlock, Bottleneck):
    """Bottleneck with CE after its third norm, which is the last, or after its second."""
    last_norm = 'norm3'

    def _residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv1_plugin_names)
        out = self.relu(self._normalize('norm2', self.conv2(out)))
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv2_plugin_names)
        out = self._normalize('norm3', self.conv3(out))
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv3_plugin_names)
        return self._add_identity(out, x)


@MODELS.register_module()
class CEResNet(CENetwork, ResNet):
    """CE-ResNet: CE after the last norm of residual blocks, before the addition (Figure 2c).

    State dict keys are ResNet's plus `ce1.*` (`stem.ce.*` in a deep stem) and `layerX.Y.ce.*`.
    ResNet checkpoints and the released CE-ResNet-50 load without conversion. `frozen_stages`
    freezes the CE layers of the stages it covers, the stem's included. `norm_eval` concerns batch
    norms only; `ce_cfg=dict(freeze=...)` freezes CE.

    Args:
        depth: 18, 34, 50, 101 or 152.
        ce_cfg: arguments of the CE layers; `type` is CE unless given, and may name any registered
            layer that takes a number of channels first.
        ce_blocks: for each stage, the indices of the blocks that carry a CE layer, such as
            `[(0, 1, 2), (0, 3), (), ()]`. Default: every block of all stages (18, 34), of the
            first three (50) or of the first two (101, which makes the paper's seven blocks; 152).
        ce_stem: whether one more CE layer, with a group size of 64, follows the stem's last norm,
            as in the released ResNet-50.
        ce_position: the norm of a block that CE follows: 'last', or 'second' for the paper's
            ablation (section 5.3).
        allow_unset: let `freeze='all'` run on statistics that were neither loaded nor trained.
        zero_init_residual: as in ResNet, but off unless asked for: CE divides by the scale of the
            features, and a gamma of zero leaves none.
        **kwargs: the other arguments of MMDetection's ResNet.

    Shape:
        - Input: images (N, 3, H, W).
        - Output: a tuple with the feature map of each stage in `out_indices`, (N, C, H', W').

    Raises:
        ValueError: for an unknown depth or position, or a block that does not exist.
        CheckpointError, RuntimeError: as CENetwork's.
    """
    arch_settings = {
        18: (CEBasicBlock, (2, 2, 2, 2)),
        34: (CEBasicBlock, (3, 4, 6, 3)),
        50: (CEBottleneck, (3, 4, 6, 3)),
        101: (CEBottleneck, (3, 4, 23, 3)),
        152: (CEBottleneck, (3, 8, 36, 3)),
    }

    def __init__(self,
                 depth: int,
                 ce_cfg: Optional[Dict] = None,
                 ce_blocks: Optional[Sequence[Sequence[int]]] = None,
                 ce_stem: bool = True,
                 ce_position: str = 'last',
                 allow_unset: bool = False,
                 zero_init_residual: bool = False,
                 **kwargs: Any) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f'depth must be one of {sorted(self.arch_settings)}, got {depth!r}')
        if ce_position not in POSITIONS:
            raise ValueError(f'ce_position must be one of {POSITIONS}, got {ce_position!r}')
        super().__init__(depth, zero_init_residual=zero_init_residual, **kwargs)
        self.ce_cfg = ce_cfg or {}
        self.allow_unset = allow_unset
        self.register_module('ce1', None)
        if ce_stem:
            self._add_stem_ce()
        self._add_block_ce(ce_blocks, ce_position)
        if zero_init_residual and not (kwargs.get('init_cfg') or kwargs.get('pretrained')):
            self._zero_last_norms()
        self._freeze_stages()  # once more, for the layers just added

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        self.check_before_first_forward()
        if self.deep_stem:
            x = self.stem(x)
        else:
            x = self.conv1(x)
            x = self.norm1(x) if self.ce1 is None else batch_norm_ce(self.norm1, self.ce1, x)
            x = self.relu(x)
        x = self.maxpool(x)
        outs = []
        for index, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if index in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def _add_stem_ce(self) -> None:
        ce = build_layer({**self.ce_cfg, 'group_size': STEM_GROUP_SIZE}, self.stem_channels)
        if self.deep_stem:
            *layers, relu = self.stem.named_children()
            self.stem = nn.Sequential()
            for name, layer in [*layers, ('ce', ce), relu]:
                self.stem.add_module(name, layer)
        else:
            self.ce1 = ce

    def _add_block_ce(self, ce_blocks: Optional[Sequence[Sequence[int]]], position: str) -> None:
        if ce_blocks is None:
            stages = zip(DEFAULT_STAGES[self.depth], self.stage_blocks)
            ce_blocks = [range(count) if chosen else () for chosen, count in stages]
        if len(ce_blocks) != self.num_stages:
            raise ValueError(f'ce_blocks needs block indices for each of the {self.num_stages} '
                             f'stages, got {ce_blocks!r}')
        for stage, indices in zip(self.res_layers, ce_blocks):
            blocks = getattr(self, stage)
            for index in indices:
                if index not in range(len(blocks)):
                    raise ValueError(f'ce_blocks names block {index!r} of {stage}, which has '
                                     f'blocks 0 to {len(blocks) - 1}')
                block = blocks[index]
                block.ce_norm = block.last_norm if position == 'last' else 'norm2'
                conv = getattr(block, block.ce_norm.replace('norm', 'conv'))
                block.ce = build_layer(self.ce_cfg, conv.out_channels)

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        ce = getattr(self, 'ce1', None)  # called by ResNet's __init__, too
        if self.frozen_stages >= 0 and ce is not None:
            ce.eval()
            ce.requires_grad_(False)

    def _zero_last_norms(self) -> None:
        # ResNet does this for its own two block classes only, and leaves out subclasses.
        for stage in self.res_layers:
            for block in getattr(self, stage):
                name = getattr(block, f'{block.last_norm}_name')
                block.init_cfg = dict(type='Constant', val=0, override=dict(name=name))

    def init_weights(self) -> None:
        """Initialize or load the weights, then log what the CE layers will do in training."""
        super().init_weights()
        print_log(self.describe_ce(), logger='current')

    def _before_first_forward(self) -> None:
        super()._before_first_forward()
        unset = self.unset_layers(frozen=False)
        if unset and self.training:
            print_log('CE layers run on initial statistics (W = I, s = 1), as their stage is '
                      f'frozen and they were never loaded: {", ".join(unset)}',
                      logger='current', level=logging.WARNING)

    def describe_ce(self) -> str:
        """One line: which CE layers learn, and which statistics they use in training."""
        layers = list(self.ce_layers())
        learning = [n for n, ce in layers if any(p.requires_grad for p in ce.parameters())]
        batch = [n for n, ce in layers if ce.freeze != 'all' and not self._in_frozen_stage(n)]
        names = [n for n, _ in layers]
        return (f'CE-ResNet-{self.depth}, {len(layers)} CE layers in training: '
                f'lambda and IR learn in {_by_stage(learning)}, '
                f'are frozen in {_by_stage(_without(names, learning))}; '
                f'batch statistics in {_by_stage(batch)}, '
                f'running statistics in {_by_stage(_without(names, batch))}')

    def _in_frozen_stage(self, name: str) -> bool:
        stage = _stage(name)
        return (0 if stage == 'stem' else int(stage[len('layer'):])) <= self.frozen_stages


def _stage(name: str) -> str:
    """'layer1' of layer1.0.ce; 'stem' of ce1 and stem.ce."""
    return name.split('.')[0] if name.startswith('layer') else 'stem'


def _without(names: List[str], others: List[str]) -> List[str]:
    return [name for name in names if name not in others]


def _by_stage(names: List[str]) -> str:
    """'stem, layer1 (3), layer2 (4)', or 'none'."""
    counts = Counter(map(_stage, names))
    return ', '.join(stage if stage == 'stem' else f'{stage} ({count})'
                     for stage, count in counts.items()) or 'none'
