"""What all CE backbones share: the checkpoints they load, and a check before the first forward."""
import logging
from typing import Any, Dict, Iterator, Tuple

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor

from ..checkpoint import convert
from ..layers import CE
from ..utils.compat import is_compiling


class CENetwork(BaseModule):
    """Mix-in for backbones with CE layers; it stands before the backbone class.

    Loads its own checkpoints, the authors', those of the network without CE (a warning says so),
    and those of whole models with this backbone: mmpretrain's classifiers, MMDetection's detectors.

    Args:
        allow_unset: let `freeze='all'` run on statistics that were neither loaded nor trained.

    Raises:
        CheckpointError: the CE layers of a checkpoint are not those of this network.
        RuntimeError: `freeze='all'` would run on unset statistics; raised when a pretrained
            checkpoint does not hold them, else in the first forward.
    """
    _statistics_checked = False

    def __init__(self, *args: Any, allow_unset: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_unset = allow_unset

    def ce_layers(self) -> Iterator[Tuple[str, CE]]:
        """Names and modules of the CE layers."""
        return ((name, m) for name, m in self.named_modules() if isinstance(m, CE))

    def init_weights(self) -> None:
        super().init_weights()
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        if any(cfg.get('type') == 'Pretrained' for cfg in configs):
            self._check_statistics()

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any,
                              **kwargs: Any) -> None:
        if not prefix:  # else a whole model is being loaded, and this is its backbone
            entries = convert.backbone_entries(state_dict)
            state_dict.clear()
            state_dict.update(entries)
        entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        found = convert.ce_entries(convert.to_ours(entries))
        expected = convert.ce_entries(self.state_dict(prefix=prefix))
        difference = convert.first_difference(expected, found)
        if found and difference:
            raise convert.CheckpointError(
                f'the CE layers of the checkpoint are not those of this network: {difference}. '
                'Build the network as the one that was trained: same depth, ce_blocks, ce_stem and '
                'ce_cfg.')
        if expected and not found:
            count = len(convert.ce_prefixes(expected))
            print_log(f'the checkpoint holds no CE layers: the {count} of this network start at '
                      'their initial values', logger='current', level=logging.WARNING)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Any:
        self.check_before_first_forward()
        return super().forward(x)

    def check_before_first_forward(self) -> None:
        """Refuse to run on statistics that were never set; the first time only."""
        # Reading the statistics waits for a GPU, and breaks the graph of a compiler.
        if not self._statistics_checked and not is_compiling():
            self._check_statistics()

    def _check_statistics(self) -> None:
        unset = {name: ce for name, ce in self.ce_layers()
                 if not ce.num_batches_tracked and not ce.uses_batch_statistics}
        frozen = [name for name, ce in unset.items() if ce.freeze == 'all']
        if frozen and not self.allow_unset:
            raise RuntimeError(
                f"CE layers with freeze='all' have statistics that were never loaded or trained: "
                f'{", ".join(frozen)}. Load a checkpoint that holds them (init_cfg or load_from), '
                "train with freeze='none' or 'adaptive', or pass allow_unset=True.")
        others = [name for name in unset if name not in frozen]
        if others and self.training:
            print_log('CE layers run on initial statistics (W = I, s = 1), as their stage is '
                      f'frozen and they were never loaded: {", ".join(others)}',
                      logger='current', level=logging.WARNING)
        self._statistics_checked = True
