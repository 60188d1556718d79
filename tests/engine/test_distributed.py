"""Training and evaluation by two real processes, and what is left when they are killed."""
import contextlib
import gc
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import FEW_ROIS, ROOT, SMALL, free_port, launcher_env, run, tool
from helpers.ranks import FORKS
from mmengine.config import Config

from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel, process_group

CONFIG = ROOT / 'configs' / 'mask_rcnn_syncce_r50.py'
EPOCHS, ITERATIONS = 3, 5

# Makes the config's model narrow and shallow.
SLIM = [
    'model.backbone.init_cfg=None', 'model.backbone.depth=18',
    'model.backbone.base_channels=16', 'model.backbone.stem_channels=16',
    'model.neck.in_channels=[16,32,64,128]', 'model.neck.out_channels=32',
    'model.rpn_head.in_channels=32', 'model.rpn_head.feat_channels=32',
    'model.roi_head.bbox_roi_extractor.out_channels=32',
    'model.roi_head.mask_roi_extractor.out_channels=32',
    'model.roi_head.bbox_head.in_channels=32', 'model.roi_head.bbox_head.fc_out_channels=64',
    'model.roi_head.mask_head.in_channels=32', 'model.roi_head.mask_head.conv_out_channels=32']
UNTRAINED = [*SMALL, *FEW_ROIS, *SLIM]
# On the generated shapes.
SHAPES = [
    *SMALL, *SLIM, 'train_dataloader.num_workers=1',
    *(f'{split}_dataloader.dataset.metainfo.classes=disk,square,triangle,star,cross'
      for split in ('train', 'val')),
    'train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
    'train_dataloader.batch_size=1', f'train_cfg.max_epochs={EPOCHS}',
    'train_cfg.val_interval=100', 'default_hooks.logger.interval=1', 'randomness.seed=0',
    'model.backbone.frozen_stages=0', 'model.train_cfg.rcnn.sampler.num=32',
    'model.train_cfg.rpn_proposal.max_per_img=50']


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
        assert (result.stdout + result.stderr).count('SyncBN needs GPUs') == 1
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


def threads_left(rank, port, fails):
    """How many threads more this rank has after a job than before, and whether the job failed."""
    def job():
        model = CPUDistributedDataParallel(torch.nn.Linear(2, 2))
        model.itself = model  # as a Runner and its hooks refer to each other
        model(torch.ones(1, 2)).sum().backward()
        dist.all_gather_object([None] * 2, torch.ones(3))
        if fails:
            raise KeyError('of the job')

    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    gc.disable()  # what it finds by chance would not be found in each run
    before, failed = len(os.listdir('/proc/self/task')), False
    try:
        with process_group(Config(dict(launcher='pytorch'))):
            job()
    except KeyError:
        failed = True
    return len(os.listdir('/proc/self/task')) - before, failed


@pytest.mark.parametrize('fails', [False, True])
def test_no_thread_outlives_the_process_group(fails):
    """One that does may abort the interpreter on its way out, once in twenty runs."""
    with ProcessPoolExecutor(2, mp_context=FORKS) as processes:
        results = processes.map(threads_left, range(2), [free_port()] * 2, [fails] * 2)
        assert list(results) == [(0, fails)] * 2


class Job:
    """A training run of two ranks, to be killed; none of it is left at the end of the context."""

    def __init__(self, data, work_dir):
        self.work_dir = work_dir
        self.log = work_dir.with_name('log.txt')  # a pipe would stay open with any data worker
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                [ROOT / 'tools/dist_train.sh', CONFIG, '2', '--auto-scale-lr', '--work-dir',
                 work_dir, '--resume', '--cfg-options', *SHAPES],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **launcher_env(data)})
        self.seen = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill_all()

    def processes(self):
        """Those that are running, the launcher first; also data workers whose rank is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                self.seen[process.pid] = process
        return [process for process in self.seen.values() if process.is_running()]

    def wait_for(self, condition):
        """Until it is true, which it has to become while the job runs."""
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def wait_for_a_moment(self, epoch, random):
        """At most 0.2 s after a line of the log."""
        iteration = random.randint(1, ITERATIONS)
        line = re.compile(rf'Epoch\(train\) +\[{epoch}\]\[{iteration}/{ITERATIONS}\]')
        self.wait_for(lambda: line.search(self.log.read_text()))
        time.sleep(random.uniform(0, 0.2))

    def finish(self):
        """The exit status, within a bounded time."""
        return self.process.wait(timeout=120)

    def kill_one_rank(self, rank):
        victim, = (p for p in psutil.Process(self.process.pid).children()
                   if p.environ().get('RANK') == str(rank))
        self.processes()  # its data workers too, which torch leaves waiting for a reader
        victim.kill()

    def kill_all(self):
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself
                process.kill()
        return self.finish()


@pytest.fixture(scope='module')
def straight(shapes, tmp_path_factory):
    """The run that nothing interrupts."""
    work_dir = tmp_path_factory.mktemp('runs') / 'straight'
    with Job(shapes, work_dir) as job:
        assert job.finish() == 0, job.log.read_text()[-3000:]
    assert len(re.findall(r'Epoch\(train\)', job.log.read_text())) == EPOCHS * ITERATIONS
    return work_dir


def assert_same_end(work_dir, straight):
    """Parameters, CE buffers, optimizer: equal to the bit."""
    ours, expected = (torch.load(folder / f'epoch_{EPOCHS}.pth', weights_only=False)
                      for folder in (work_dir, straight))
    assert ours['state_dict'].keys() == expected['state_dict'].keys()
    assert not [name for name, value in expected['state_dict'].items()
                if not torch.equal(value, ours['state_dict'][name])]
    ours, expected = ours['optimizer'], expected['optimizer']
    assert ours['param_groups'] == expected['param_groups']
    for index, state in expected['state'].items():
        assert torch.equal(state['momentum_buffer'], ours['state'][index]['momentum_buffer'])


class TestInterruption:
    """Ways to die, never in the last epoch: a run might be over before the kill comes."""

    @staticmethod
    def one_rank(job, epoch, random):
        """After which the job ends by itself."""
        job.wait_for_a_moment(epoch, random)
        job.kill_one_rank(random.randint(0, 1))
        assert job.finish() != 0

    @staticmethod
    def all_ranks(job, epoch, random):
        job.wait_for_a_moment(epoch, random)
        assert job.kill_all() == -signal.SIGKILL

    @staticmethod
    def checkpoint_write(job, epoch, random):
        """Of a checkpoint half is there; it is not noted yet, the one before is."""
        path = job.work_dir / f'epoch_{epoch}.pth'
        job.wait_for(path.exists)
        assert job.kill_all() == -signal.SIGKILL
        os.truncate(path, path.stat().st_size // 2)
        before = job.work_dir / f'epoch_{epoch - 1}.pth'
        (job.work_dir / 'last_checkpoint').write_text(str(before))

    @pytest.mark.parametrize(('ways', 'seed'), [
        ([('checkpoint_write', 2), ('one_rank', 2)], 0),
        *(pytest.param([('one_rank', 1), ('all_ranks', 1), ('all_ranks', 2), ('one_rank', 2),
                        ('checkpoint_write', 2)], seed, marks=pytest.mark.long)
          for seed in (1, 2, 3))])
    def test_killed_runs_end_as_the_uninterrupted_one(self, ways, seed, shapes, straight,
                                                      tmp_path):
        source = random.Random(seed)
        for name, epoch in ways:
            with Job(shapes, tmp_path / 'run') as job:
                getattr(self, name)(job, epoch, source)
        with Job(shapes, tmp_path / 'run') as job:
            assert job.finish() == 0, job.log.read_text()[-3000:]
        assert 'resumed epoch: ' in job.log.read_text()
        assert_same_end(tmp_path / 'run', straight)


class TestResumeRefusals:
    """One clear error; the file is left as it was."""

    @pytest.fixture
    def refusal(self, tool_here, shapes, work_dir):
        def run_it(*arguments):
            before = {path: path.read_bytes() for path in work_dir.glob('*.pth')}
            result = tool_here('train.py', CONFIG, '--work-dir', work_dir, '--resume', *arguments,
                               '--cfg-options', *SHAPES, cwd=work_dir,
                               env=dict(COCO_ROOT=str(shapes)))
            assert result.returncode == 1
            assert {path: path.read_bytes() for path in work_dir.glob('*.pth')} == before
            return result.stderr

        return run_it

    @pytest.fixture
    def work_dir(self, straight, tmp_path):
        """A finished run, its last checkpoint cut in half."""
        for epoch in (1, 2, 3):
            shutil.copy(straight / f'epoch_{epoch}.pth', tmp_path)
        os.truncate(tmp_path / 'epoch_3.pth', (tmp_path / 'epoch_3.pth').stat().st_size // 2)
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
        return tmp_path

    def test_truncated(self, refusal, work_dir):
        message = refusal()
        assert f'cannot resume: not a checkpoint: {work_dir}/epoch_3.pth is damaged' in message
        assert f'--resume {work_dir}/epoch_2.pth' in message

    def test_weights_alone(self, refusal, work_dir):
        path = work_dir / 'weights.pth'
        torch.save(dict(state_dict={}), path)
        message = refusal(path)
        assert f'cannot resume: {path} has no meta, optimizer, message_hub' in message
        assert f'load_from={path}' in message

    def test_another_model(self, refusal, work_dir):
        path = work_dir / 'epoch_2.pth'
        state = torch.load(path, weights_only=False)
        state['state_dict']['backbone.layer2.0.ce.lambda_logit'] = torch.zeros(3)
        torch.save(state, path)
        assert ('backbone.layer2.0.ce.lambda_logit is (3,) in the checkpoint and (1,) in the '
                'network') in refusal(path)
