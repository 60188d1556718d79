"""ResNet with Channel Equilibrium layers; everything else is MMDetection's ResNet."""
from collections import Counter, OrderedDict
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import CE
from ...layers.fused import batch_norm_ce
from ..ce_network import CENetwork
from ..insert import build_layer

# The number of stages, from the first, whose blocks carry CE unless `ce_blocks` says otherwise. For
# 18 and 101 it is the paper's, for 50 the released code's, which also has CE in the stem. The paper
# has no 34 and no 152: 34 follows 18 (same blocks), 152 follows 101.
DEFAULT_STAGES = {18: 4, 34: 4, 50: 3, 101: 2, 152: 2}


class _CEBlock(BaseModule):
    """What both blocks share: a CE layer behind the norm named `ce_norm`, if there is one."""
    convs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module('ce', None)
        self.ce_norm = self.last_norm = f'norm{self.convs}'

    def forward(self, x: Tensor) -> Tensor:
        checkpointed = self.with_cp and x.requires_grad
        out = checkpoint(self._sum, x, use_reentrant=False) if checkpointed else self._sum(x)
        return self.relu(out)

    def _sum(self, x: Tensor) -> Tensor:
        out = x
        for index in range(1, self.convs + 1):
            out = getattr(self, f'conv{index}')(out)
            norm = getattr(self, f'norm{index}')
            has_ce = self.ce is not None and self.ce_norm == f'norm{index}'
            out = batch_norm_ce(norm, self.ce, out) if has_ce else norm(out)
            if index < self.convs:
                out = self.relu(out)
            for name in getattr(self, f'after_conv{index}_plugin_names', ()):
                out = getattr(self, name)(out)
        out += x if self.downsample is None else self.downsample(x)
        return out


class CEBasicBlock(_CEBlock, BasicBlock):
    """BasicBlock with CE after its second norm."""
    convs = 2


class CEBottleneck(_CEBlock, Bottleneck):
    """Bottleneck with CE after its third norm, or after its second."""
    convs = 3


@MODELS.register_module()
class CEResNet(CENetwork, ResNet):
    """CE-ResNet: CE after the last norm of residual blocks, before the addition (Figure 2c).

    State dict keys are ResNet's plus `ce1.*` (`stem.ce.*` in a deep stem) and `layerX.Y.ce.*`.
    `frozen_stages` freezes the CE layers of the stages it covers, the stem's included. `norm_eval`
    concerns batch norms only; `ce_cfg=dict(freeze=...)` freezes CE.

    Args:
        depth: 18, 34, 50, 101 or 152.
        ce_cfg: arguments of the CE layers; `type` is CE unless given, and may name any registered
            layer that takes a number of channels first.
        ce_blocks: indices of the blocks with CE in each stage, such as `[(0, 2), (0, 3), (), ()]`.
            Default: all blocks of all stages (18, 34), of three (50) or of two (101, 152).
        ce_stem: whether CE with a group size of 64 follows the stem's last norm, as in the released
            ResNet-50.
        ce_position: the norm of a block that CE follows: 'last', or 'second' for the paper's
            ablation (section 5.3).
        zero_init_residual: as in ResNet, but off unless asked for: CE divides by the scale of the
            features, and a gamma of zero leaves none.
        **kwargs: those of CENetwork, which has more errors raised, and of MMDetection's ResNet.

    Shape:
        - Input: images (N, 3, H, W).
        - Output: a tuple with the feature map of each stage in `out_indices`, (N, C, H', W').

    Raises:
        ValueError: for an unknown depth or position, or a block that does not exist.
    """
    stem: nn.Module  # a deep one
    arch_settings = {depth: (CEBasicBlock if block is BasicBlock else CEBottleneck, counts)
                     for depth, (block, counts) in ResNet.arch_settings.items()}

    def __init__(self, depth: int, ce_cfg: Optional[Dict] = None,
                 ce_blocks: Optional[Sequence[Sequence[int]]] = None, ce_stem: bool = True,
                 ce_position: str = 'last', zero_init_residual: bool = False,
                 **kwargs: Any) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f'depth must be one of {sorted(self.arch_settings)}, got {depth!r}')
        if ce_position not in ('last', 'second'):
            raise ValueError(f"ce_position must be 'last' or 'second', got {ce_position!r}")
        super().__init__(depth, zero_init_residual=zero_init_residual, **kwargs)
        self.ce_cfg = ce_cfg or {}
        self.register_module('ce1', None)
        if ce_stem:
            # The released ResNet-50 whitens all 64 channels of the stem in one group.
            ce = build_layer({**self.ce_cfg, 'group_size': 64}, self.stem_channels)
            if self.deep_stem:
                *layers, relu = self.stem.named_children()
                self.stem = nn.Sequential(OrderedDict([*layers, ('ce', ce), relu]))
            else:
                self.ce1 = ce
        self._add_block_ce(ce_blocks, ce_position)
        if zero_init_residual and not (kwargs.get('init_cfg') or kwargs.get('pretrained')):
            for block in (m for m in self.modules() if isinstance(m, _CEBlock)):
                # ResNet does this for its own two classes only, and leaves out subclasses
                block.init_cfg = dict(type='Constant', val=0, override=dict(name=block.last_norm))
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

    def _add_block_ce(self, ce_blocks: Optional[Sequence[Sequence[int]]], position: str) -> None:
        if ce_blocks is None:
            stages = DEFAULT_STAGES[self.depth]
            ce_blocks = [range(count if stage < stages else 0)
                         for stage, count in enumerate(self.stage_blocks)]
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

    def init_weights(self) -> None:
        """Initialize or load the weights, then log what the CE layers will do in training."""
        super().init_weights()
        print_log(self.describe_ce(), logger='current')

    def describe_ce(self) -> str:
        """One line: which CE layers learn, and which statistics they use in this mode."""
        def stages(condition: Callable[[CE], bool]) -> str:
            """'layer1 (3), layer2 (4), stem', or 'none'."""
            counts = Counter(name.split('.')[0] if name.startswith('layer') else 'stem'
                             for name, ce in self.ce_layers() if condition(ce))
            return ', '.join(stage if stage == 'stem' else f'{stage} ({count})'
                             for stage, count in counts.items()) or 'none'

        def learns(ce: CE) -> bool:
            return any(p.requires_grad for p in ce.parameters())

        return (f'CE-ResNet-{self.depth}, {len(list(self.ce_layers()))} CE layers in training: '
                f'lambda and IR learn in {stages(learns)}, '
                f'are frozen in {stages(lambda ce: not learns(ce))}; '
                f'batch statistics in {stages(lambda ce: ce.uses_batch_statistics)}, '
                f'running statistics in {stages(lambda ce: not ce.uses_batch_statistics)}')
