"""What all CE backbones share: the checkpoints they load, and a check before the first forward."""
import logging
from typing import Iterator, List, Tuple

from mmengine.logging import print_log
from torch import Tensor, nn

from ...checkpoint.convert import CE_ENTRY, check_ce_entries, keep_backbone
from ...layers import CE
from ...utils.compat import is_compiling


class CENetwork(nn.Module):
    """Mix-in for backbones with CE layers; put it before the backbone class.

    Loads its own checkpoints, the authors', those of the network without CE (the log then says
    that CE starts at its initial values), and those of whole models with this backbone:
    mmpretrain's classifiers and MMDetection's detectors.

    Attributes:
        allow_unset: let `freeze='all'` run on statistics that were neither
            loaded nor trained.

    Raises:
        CheckpointError: on loading a checkpoint whose CE layers are not those
            of this network; it names the first entry that differs.
        RuntimeError: if `freeze='all'` would run on unset statistics; when a
            pretrained checkpoint did not hold them, else in the first forward.
    """
    allow_unset = False
    _statistics_checked = False

    def ce_layers(self) -> Iterator[Tuple[str, CE]]:
        """Names and modules of the CE layers."""
        return ((name, m) for name, m in self.named_modules() if isinstance(m, CE))

    def init_weights(self) -> None:
        super().init_weights()
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        if any(cfg.get('type') == 'Pretrained' for cfg in configs):
            self._check_statistics()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if not prefix:  # else a whole model is being loaded, and this is its backbone
            keep_backbone(state_dict)
        layers = dict(self.ce_layers())
        check_ce_entries(state_dict, prefix, layers)
        has_ce = any(CE_ENTRY.match(key) for key in state_dict if key.startswith(prefix))
        if layers and not has_ce:
            print_log(f'the checkpoint holds no CE layers: the {len(layers)} of this network '
                      'start at their initial values', logger='current', level=logging.WARNING)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor):
        self.check_before_first_forward()
        return super().forward(x)

    def check_before_first_forward(self) -> None:
        """Refuse to run on statistics that were never set; the first time only."""
        # Reading the statistics waits for a GPU, and breaks the graph of a compiler.
        if not self._statistics_checked and not is_compiling():
            self._before_first_forward()
            self._statistics_checked = True

    def _before_first_forward(self) -> None:
        self._check_statistics()

    def unset_layers(self, frozen: bool) -> List[str]:
        """CE layers that would use initial statistics, by `freeze='all'` or by their mode."""
        return [name for name, ce in self.ce_layers()
                if not ce.num_batches_tracked and not ce.uses_batch_statistics
                and (ce.freeze == 'all') is frozen]

    def _check_statistics(self) -> None:
        unset = self.unset_layers(frozen=True)
        if unset and not self.allow_unset:
            raise RuntimeError(
                f"CE layers with freeze='all' have statistics that were never loaded or trained: "
                f'{", ".join(unset)}. Load a checkpoint that holds them (init_cfg or load_from), '
                "train with freeze='none' or 'adaptive', or pass allow_unset=True.")
