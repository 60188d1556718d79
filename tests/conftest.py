"""Paths and helpers shared by the tests."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SHARED_COCO = ROOT.parent / 'shared' / 'coco_real_mini'

# Shortens a run on COCO-like data without changing what is run.
SMALL = ['train_dataloader.dataset.pipeline.2.scale=(160,128)',
         'val_dataloader.dataset.pipeline.1.scale=(160,128)',
         'test_dataloader.dataset.pipeline.1.scale=(160,128)',
         'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
         'val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False',
         'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']

# RoIAlign is what costs most on a CPU; and untrained weights make no confident detection,
# without which there is no summary.
FEW_ROIS = ['model.train_cfg.rcnn.sampler.num=16', 'model.train_cfg.rpn_proposal.max_per_img=50',
            'model.test_cfg.rcnn.score_thr=0.001', 'model.test_cfg.rcnn.max_per_img=10']

# The legacy stack, see cenet_mmdet/stacks.py.
LEGACY = torch.__version__.startswith('2.1.')

# What can be computed in on CPUs: torch 2.1 has neither float16 autocast nor products there.
HALF = {'bfloat16': torch.bfloat16, **({} if LEGACY else {'float16': torch.float16})}

# `make test` and `make test-long`, whose properties are tried on 10,000 examples and more.
settings.register_profile('short', deadline=None, max_examples=30, derandomize=True)
settings.register_profile('long', deadline=None, max_examples=1500, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('short')

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A small generated COCO-style set, made by the command that users type."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    tool('dev/make_demo_data.py', folder, '--train', 10, '--val', 6)
    return folder


@pytest.fixture(scope='session')
def real_coco():
    """183 real COCO images, where they lie beside the checkout."""
    if not SHARED_COCO.is_dir():
        pytest.skip(f'no real COCO images at {SHARED_COCO}')
    return SHARED_COCO


def run(*command, cwd=None, env=None, check=True, timeout=600):
    """Run a command line; its output is in the assertion message where it fails."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, text=True, timeout=timeout,
                            capture_output=True, env={**os.environ, **(env or {})})
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result


def tool(name, *arguments, **options):
    """Run one of tools/*.py with the interpreter of the tests."""
    return run(sys.executable, ROOT / 'tools' / name, *arguments, **options)
