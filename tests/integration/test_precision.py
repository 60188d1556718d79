"""Mixed precision: CE's statistics stay float32, and training ends where float32's does.

MMCV's operators on CPUs take float32 only, so the backbone and the neck, which hold
all CE layers, run under autocast here, and the heads get float32 features.
"""
import math

import pytest
import torch
from conftest import HALF, ROOT, tool
from mmdet.models import MaskRCNN
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from cenet_mmdet import CE


@MODELS.register_module()
class MixedPrecisionMaskRCNN(MaskRCNN):
    """Mask R-CNN whose feature extraction runs under autocast; float32 switches it off."""

    def __init__(self, dtype, **kwargs):
        super().__init__(**kwargs)
        self.dtype = HALF.get(dtype)

    def extract_feat(self, batch_inputs):
        with torch.autocast('cpu', self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            features = super().extract_feat(batch_inputs)
        return tuple(feature.float() for feature in features)


def train(dtype, data, work_dir, steps=200):
    """The demo's configuration for a number of steps: its losses."""
    cfg = Config.fromfile(ROOT / 'configs/demo/mask_rcnn_ce_r18_shapes.py')
    cfg.merge_from_dict({
        'model.type': 'MixedPrecisionMaskRCNN', 'model.dtype': dtype,
        'work_dir': str(work_dir), 'randomness.seed': 0,
        'train_cfg.max_epochs': math.ceil(steps * 4 / 200), 'train_cfg.val_interval': 100,
        'train_dataloader.dataset.data_root': str(data),
        'train_dataloader.dataset.filter_cfg.filter_empty_gt': False,
        'default_hooks.checkpoint': None})
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses, _ = runner.message_hub.get_scalar('train/loss').data
    assert len(losses) == steps
    assert all(torch.isfinite(b).all() for b in runner.model.buffers())
    assert all(m.running_whitening.dtype == torch.float32
               for m in runner.model.modules() if isinstance(m, CE))
    return torch.tensor(losses)


@pytest.mark.long
def test_200_steps_end_where_float32_does(tmp_path):
    """On the demo's data: all losses finite, the last 50 within 5 per cent of float32's."""
    tool('dev/make_demo_data.py', tmp_path / 'shapes', '--train', 200, '--val', 1)
    expected = train('float32', tmp_path / 'shapes', tmp_path / 'float32')
    assert expected[-50:].mean() < 0.6 * expected[:10].mean()  # it learns
    for dtype in HALF:
        losses = train(dtype, tmp_path / 'shapes', tmp_path / dtype)
        ratio = float(losses[-50:].mean() / expected[-50:].mean())
        print(f"{dtype}: the last 50 of 200 losses are {ratio:.3f} of float32's")
        assert torch.isfinite(losses).all()
        assert abs(ratio - 1) < 0.05
