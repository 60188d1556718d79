"""Training and evaluation by two real processes, and what is left when they are killed."""
import contextlib
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import FEW_ROIS, ROOT, SMALL, run, tool

CONFIG = ROOT / 'configs' / 'mask_rcnn_syncce_r50.py'
PATH = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
EPOCHS, ITERATIONS = 3, 5

# mask_rcnn_syncce_r50.py, narrow and shallow, on the generated shapes.
TINY = [
    *SMALL, 'train_dataloader.num_workers=1',
    *(f'{split}_dataloader.dataset.metainfo.classes=disk,square,triangle,star,cross'
      for split in ('train', 'val')),
    'train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
    'train_dataloader.batch_size=1', f'train_cfg.max_epochs={EPOCHS}',
    'train_cfg.val_interval=100', 'default_hooks.logger.interval=1', 'randomness.seed=0',
    'model.backbone.init_cfg=None', 'model.backbone.depth=18', 'model.backbone.frozen_stages=0',
    'model.backbone.base_channels=16', 'model.backbone.stem_channels=16',
    'model.neck.in_channels=[16,32,64,128]', 'model.neck.out_channels=32',
    'model.rpn_head.in_channels=32', 'model.rpn_head.feat_channels=32',
    'model.roi_head.bbox_roi_extractor.out_channels=32',
    'model.roi_head.mask_roi_extractor.out_channels=32',
    'model.roi_head.bbox_head.in_channels=32', 'model.roi_head.bbox_head.fc_out_channels=64',
    'model.roi_head.mask_head.in_channels=32', 'model.roi_head.mask_head.conv_out_channels=32',
    'model.train_cfg.rcnn.sampler.num=32', 'model.train_cfg.rpn_proposal.max_per_img=50']


def launcher_env(data):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return dict(COCO_ROOT=str(data), PATH=PATH, PORT=str(free.getsockname()[1]))


UNTRAINED = [*SMALL, *FEW_ROIS, 'model.backbone.init_cfg=None']


@pytest.fixture(scope='module')
def two_ranks(real_coco, tmp_path_factory):
    folder = tmp_path_factory.mktemp('two_ranks')
    result = run(ROOT / 'tools/dist_train.sh', CONFIG, 2, '--cfg-options', *UNTRAINED,
                 'train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=8',
                 'val_dataloader.dataset.indices=4', 'default_hooks.logger.interval=1',
                 cwd=folder, env=launcher_env(real_coco))
    return folder / 'work_dirs/mask_rcnn_syncce_r50/epoch_1.pth', result


class TestTwoRanks:
    """The launchers without a GPU, on real images of different sizes, to the COCO summary."""

    def test_dist_train_reaches_the_summary(self, two_ranks):
        checkpoint, result = two_ranks
        assert result.stdout.count('Average Precision') >= 12
        assert len(re.findall(r'Epoch\(train\) \[1\]\[./2\]', result.stdout)) == 2
        warning = 'SyncBN needs GPUs'
        assert (result.stdout + result.stderr).count(warning) == 1
        state = torch.load(checkpoint, weights_only=False)['state_dict']
        # 2 iterations in the stages that learn; the stem and layer1 are frozen
        assert state['backbone.layer2.0.ce.num_batches_tracked'] == 2
        assert state['backbone.layer1.0.ce.num_batches_tracked'] == 0

    def test_two_ranks_evaluate_as_one_does(self, two_ranks, real_coco, tmp_path):
        """An odd number of images: every box, score, label and mask is the same to the bit."""
        checkpoint, _ = two_ranks
        options = ['--cfg-options', *UNTRAINED, 'test_dataloader.dataset.indices=7']
        two = run(ROOT / 'tools/dist_test.sh', CONFIG, checkpoint, 2, '--out', 'two.pkl',
                  *options, cwd=tmp_path, env=launcher_env(real_coco)).stdout
        # one thread, as torchrun gives each rank: more of them sum in another order
        one = tool('test.py', CONFIG, checkpoint, '--out', 'one.pkl', *options, cwd=tmp_path,
                   env=dict(COCO_ROOT=str(real_coco), OMP_NUM_THREADS='1',
                            MKL_NUM_THREADS='1')).stdout
        summary = re.compile(r'(Average .* = \S+|mAP_copypaste: .*)')
        assert len(summary.findall(one)) == 26
        assert summary.findall(one) == summary.findall(two)
        ours, theirs = (pickle.loads((tmp_path / name).read_bytes())
                        for name in ('one.pkl', 'two.pkl'))
        assert len(ours) == len(theirs) == 7
        for a, b in zip(ours, theirs):
            assert a['img_id'] == b['img_id']
            a, b = a['pred_instances'], b['pred_instances']
            assert len(a['scores']) > 0
            assert a['masks'] == b['masks']
            for key in ('bboxes', 'scores', 'labels'):
                assert torch.equal(a[key], b[key])

    def test_amp_is_refused_without_a_gpu(self, real_coco, tmp_path):
        result = tool('train.py', CONFIG, '--amp', '--cfg-options',
                      'model.backbone.init_cfg=None', cwd=tmp_path, check=False,
                      env=dict(COCO_ROOT=str(real_coco), CUDA_VISIBLE_DEVICES=''))
        assert result.returncode == 1
        assert result.stderr.strip().endswith('Leave it out.')
        assert not list(tmp_path.iterdir())


# A job of MMEngine's collectives that says how many threads each rank has in the end.
THREADS = '''
import os, sys
import torch, torch.distributed as dist
from mmengine.config import Config
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel, process_group

def job():
    model = CPUDistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = model  # as a Runner and its hooks refer to each other
    model(torch.ones(1, 2)).sum().backward()
    dist.all_gather_object([None] * 2, torch.ones(3))
    if sys.argv[1:]:
        raise KeyError('of the job')

threads = lambda: len(os.listdir('/proc/self/task'))
before = threads()
try:
    with process_group(Config(dict(launcher='pytorch'))):
        job()
except KeyError:
    print('an error')
print('threads', threads() - before)
'''


@pytest.mark.parametrize('error', [[], ['error']], ids=['success', 'error'])
def test_no_thread_outlives_the_process_group(error, tmp_path):
    """One that does may abort the interpreter on its way out, once in twenty runs."""
    (tmp_path / 'job.py').write_text(THREADS)
    out = run('torchrun', '--nproc-per-node=2', f'--master-port={launcher_env("")["PORT"]}',
              'job.py', *error, cwd=tmp_path, env=dict(PATH=PATH, OMP_NUM_THREADS='1')).stdout
    assert out.count('threads 0') == 2, out
    assert out.count('an error') == 2 * len(error)


class Job:
    """A training run of two ranks, to be killed."""

    def __init__(self, data, work_dir):
        self.work_dir = work_dir
        self.log = work_dir.with_name('log.txt')  # a pipe would stay open with any data worker
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                [ROOT / 'tools/dist_train.sh', CONFIG, '2', '--auto-scale-lr', '--work-dir',
                 work_dir, '--resume', '--cfg-options', *TINY],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **launcher_env(data)})

    def read_until(self, pattern):
        """Wait for a line of the log."""
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def finish(self, timeout=120):
        """The exit status, within a bounded time."""
        return self.process.wait(timeout)

    def kill_one_rank(self, rank):
        """Returns its data workers, which torch leaves waiting for a reader."""
        victim, = (p for p in psutil.Process(self.process.pid).children()
                   if p.environ().get('RANK') == str(rank))
        workers = victim.children(recursive=True)
        kill(victim)
        return workers

    def kill_all(self):
        parent = psutil.Process(self.process.pid)
        kill(parent, *parent.children(recursive=True))
        assert self.finish() == -signal.SIGKILL


def kill(*processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child of one just killed
            process.kill()


def final_state(work_dir):
    return torch.load(work_dir / f'epoch_{EPOCHS}.pth', weights_only=False)


@pytest.fixture(scope='module')
def straight(shapes, tmp_path_factory):
    """The run that nothing interrupts."""
    work_dir = tmp_path_factory.mktemp('runs') / 'straight'
    job = Job(shapes, work_dir)
    assert job.finish() == 0, job.log.read_text()[-3000:]
    assert len(re.findall(r'Epoch\(train\)', job.log.read_text())) == EPOCHS * ITERATIONS
    return work_dir


def assert_same_end(work_dir, straight):
    """Parameters, CE buffers, optimizer: equal to the bit."""
    ours, expected = final_state(work_dir), final_state(straight)
    assert ours['state_dict'].keys() == expected['state_dict'].keys()
    different = [name for name, value in expected['state_dict'].items()
                 if not torch.equal(value, ours['state_dict'][name])]
    assert not different
    ours, expected = ours['optimizer'], expected['optimizer']
    assert ours['param_groups'] == expected['param_groups']
    for index, state in expected['state'].items():
        assert torch.equal(state['momentum_buffer'], ours['state'][index]['momentum_buffer'])


class Interruptions:
    """Ways to die, each in the given epoch; the iteration is random."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def _iteration(self, job, epoch):
        iteration = self.random.randint(1, ITERATIONS - 1)
        job.read_until(rf'Epoch\(train\) +\[{epoch}\]\[{iteration}/{ITERATIONS}\]')
        time.sleep(self.random.uniform(0, 0.2))

    def one_rank(self, job, epoch):
        self._iteration(job, epoch)
        start = time.monotonic()
        workers = job.kill_one_rank(self.random.randint(0, 1))
        assert job.finish(timeout=60) != 0
        kill(*workers)
        return f'one rank, the job ended {time.monotonic() - start:.1f} s later'

    def all_ranks(self, job, epoch):
        self._iteration(job, epoch)
        job.kill_all()
        return 'all ranks'

    def checkpoint_write(self, job, epoch):
        job.read_until(rf'Epoch\(train\) +\[{epoch}\]\[{ITERATIONS - 1}/{ITERATIONS}\]')
        path = job.work_dir / f'epoch_{epoch}.pth'
        while not path.exists():
            assert job.process.poll() is None
        job.kill_all()
        return f'writing a checkpoint, {path.stat().st_size / 1e6:.1f} MB written'


def interrupt(kinds, seed, shapes, straight, work_dir):
    """Kill a run once for each (kind, epoch), resume it each time, compare the end."""
    ways = Interruptions(seed)
    for kind, epoch in kinds:
        job = Job(shapes, work_dir)
        print(f'epoch {epoch}:', getattr(ways, kind)(job, epoch))
    job = Job(shapes, work_dir)
    assert job.finish() == 0, job.log.read_text()[-3000:]
    assert 'resumed epoch: ' in job.log.read_text()
    assert_same_end(work_dir, straight)


class TestInterruption:

    def test_killed_runs_end_as_the_uninterrupted_one(self, shapes, straight, tmp_path):
        # The next kill is an epoch later: the checkpoint may be whole when the kill comes.
        interrupt([('checkpoint_write', 2), ('one_rank', 3)], 0, shapes, straight,
                  tmp_path / 'run')

    @pytest.mark.long
    @pytest.mark.parametrize('seed', range(3))
    def test_killed_again_and_again(self, seed, shapes, straight, tmp_path):
        interrupt([('one_rank', 1), ('all_ranks', 1), ('checkpoint_write', 1), ('all_ranks', 2),
                   ('checkpoint_write', 2), ('one_rank', 3), ('checkpoint_write', 3)],
                  seed, shapes, straight, tmp_path / 'run')


class TestResumeRefusals:
    """One clear error; the file is left as it was."""

    @staticmethod
    def refusal(data, work_dir, *arguments):
        before = {path: path.read_bytes() for path in work_dir.glob('*.pth')}
        result = tool('train.py', CONFIG, '--work-dir', work_dir, '--resume', *arguments,
                      '--cfg-options', *TINY, check=False, env=dict(COCO_ROOT=str(data)))
        assert result.returncode == 1
        assert 'Traceback' not in result.stderr
        assert {path: path.read_bytes() for path in work_dir.glob('*.pth')} == before
        return result.stderr

    @pytest.fixture
    def work_dir(self, straight, tmp_path):
        """A finished run, its last checkpoint cut in half."""
        for name in ('epoch_1.pth', 'epoch_2.pth'):
            (tmp_path / name).write_bytes((straight / name).read_bytes())
        last = (straight / 'epoch_3.pth').read_bytes()
        (tmp_path / 'epoch_3.pth').write_bytes(last[:len(last) // 2])
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
        return tmp_path

    def test_truncated(self, shapes, work_dir):
        message = self.refusal(shapes, work_dir)
        assert f'cannot resume: not a checkpoint: {work_dir}/epoch_3.pth is damaged' in message
        assert f'--resume {work_dir}/epoch_2.pth' in message

    def test_weights_alone(self, shapes, work_dir):
        path = work_dir / 'weights.pth'
        torch.save(dict(state_dict={}), path)
        message = self.refusal(shapes, work_dir, path)
        assert f'cannot resume: {path} has no meta, optimizer, message_hub' in message
        assert f'load_from={path}' in message

    def test_another_model(self, shapes, work_dir):
        state = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
        state['state_dict']['backbone.layer2.0.ce.lambda_logit'] = torch.zeros(3)
        path = work_dir / 'epoch_2.pth'
        torch.save(state, path)
        message = self.refusal(shapes, work_dir, path)
        assert ('backbone.layer2.0.ce.lambda_logit is (3,) in the checkpoint and (1,) in the '
                'network') in message
