"""Paths and helpers shared by the tests; those of the layers run where torch is alone."""
import contextlib
import functools
import io
import logging
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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

# The legacy stack, see cenet_mmdet/utils/stacks.py.
LEGACY = torch.__version__.startswith('2.1.')

# What can be computed in on CPUs: torch 2.1 has neither float16 autocast nor products there.
HALF = {'bfloat16': torch.bfloat16, **({} if LEGACY else {'float16': torch.float16})}

# `make test` and `make test-long`, whose properties are tried on 10,000 examples and more.
ANY_SPEED = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile('short', max_examples=30, derandomize=True, **ANY_SPEED)
settings.register_profile('long', max_examples=1500, print_blob=True, **ANY_SPEED)
settings.load_profile('short')

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A small generated COCO-style set, made by the command that users type."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    tool('dev/make_demo_data.py', folder, '--train', 10, '--val', 6)
    return folder


@pytest.fixture(scope='session')
def ranks(tmp_path_factory):
    """Three processes of one group."""
    from helpers.ranks import Ranks

    with Ranks(3, tmp_path_factory.mktemp('ranks')) as started:
        yield started


@pytest.fixture(scope='session')
def real_coco():
    """183 real COCO images, where they lie beside the checkout."""
    if not SHARED_COCO.is_dir():
        pytest.skip(f'no real COCO images at {SHARED_COCO}')
    return SHARED_COCO


@pytest.fixture
def plain_configs(monkeypatch):
    """MMEngine lays out each config that it writes, which takes longer than a training step."""
    for place in ('yapf.yapflib.yapf_api.FormatCode', 'mmengine.config.config.FormatCode'):
        monkeypatch.setattr(place, lambda text, **_: (text, True), raising=False)


@pytest.fixture
def log(caplog):
    """Messages of MMEngine's logger, which does not propagate to pytest's."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    """This process alone, as torchrun would start it."""
    for name, value in (('RANK', '0'), ('LOCAL_RANK', '0'), ('WORLD_SIZE', '1')):
        monkeypatch.setenv(name, value)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()


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


def free_port():
    """A port that nothing listens on, as text."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def launcher_env(data):
    """Environment of tools/dist_*.sh: the data, torchrun, and a port of its own."""
    return dict(COCO_ROOT=str(data), PORT=free_port(),
                PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')


def run_here(patch, name, *arguments, cwd, env=None):
    """`tool` within this process, which has imported the libraries; that takes others seconds."""
    for variable, value in (env or {}).items():
        patch.setenv(variable, str(value))
    patch.chdir(cwd)
    patch.setattr(sys, 'argv', [name, *map(str, arguments)])
    patch.syspath_prepend(ROOT / 'tools')
    out, error, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
    logging.disable(logging.NOTSET)  # some tools silence MMEngine's log
    if isinstance(status, str):  # which Python prints on its way out
        error.write(f'{status}\n')
        status = 1
    return subprocess.CompletedProcess(name, status or 0, out.getvalue(), error.getvalue())


@pytest.fixture
def tool_here(monkeypatch):
    """`run_here`; variables and the working directory stay until the test ends."""
    return functools.partial(run_here, monkeypatch)
