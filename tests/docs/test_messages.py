"""The messages that docs/troubleshoot.md quotes, each provoked for real."""
import importlib
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import mmcv
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run
from mmdet.models import ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cenet_mmdet import CE, CEResNet, ChannelHealthHook, ExactResumeHook, insert_ce
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel
from cenet_mmdet.engine.preflight import missing_files

HEADINGS = re.findall(r'^### `(.+)`$', (ROOT / 'docs/troubleshoot.md').read_text(), re.MULTILINE)
CLASSES = ('disk', 'square', 'triangle', 'star', 'cross')
SLIM = dict(base_channels=8, stem_channels=8)
PLUGIN = dict(cfg=dict(type='CE'), stages=(True, True, True, False), position='after_conv3')

# Messages of releases that are not installed beside each other, with the reason.
NOT_HERE = {
    'operator torchvision::nms does not exist': 'a torchvision for another build of torch',
    "No module named 'pkg_resources'": 'mmengine 0.10.7 with setuptools 81 or later',
    'A module that was compiled using NumPy 1.x cannot be run in': 'torch 2.1 with numpy 2',
}

provoked = []


def quotes(heading):
    """The test provokes this message, and is given it as it stands on the page."""
    provoked.append(heading)
    return pytest.mark.parametrize('heading', [heading], ids=[heading[:40]])


def says(text, heading):
    """Whether the text has the message, in which `...` stands for anything."""
    return re.search('.*'.join(map(re.escape, heading.split('...'))), str(text), re.DOTALL)


def raised(function, *arguments, **options):
    """The message of the exception that the function ends in."""
    with pytest.raises(Exception) as error:
        function(*arguments, **options)
    return str(error.value)


def warned(function, *arguments):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        function(*arguments)
    return '\n'.join(str(warning.message) for warning in found)


@pytest.fixture
def log(caplog):
    """Messages of MMEngine's logger, which does not propagate to pytest's."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()


def test_all_that_is_quoted_is_provoked():
    assert len(HEADINGS) > 30
    assert sorted(HEADINGS) == sorted([*provoked, *NOT_HERE])


class TestEnvironment:

    @pytest.fixture(scope='class')
    @staticmethod
    def without_operators(tmp_path_factory):
        """The output of imports beside an mmcv without its compiled part."""
        folder = tmp_path_factory.mktemp('site')
        (folder / 'mmcv').mkdir()
        for path in Path(mmcv.__file__).parent.iterdir():
            if not path.name.startswith('_ext'):
                (folder / 'mmcv' / path.name).symlink_to(path)
        return run(sys.executable, '-c', 'import cenet_mmdet; import mmdet.models', cwd=folder,
                   env=dict(PYTHONPATH=str(folder)), check=False).stderr

    @quotes("No module named 'mmcv._ext'")
    def test_no_operators(self, heading, without_operators):
        assert says(without_operators, heading)

    @quotes('cenet_mmdet: ... is installed but cannot be used, what needs it is left out')
    def test_what_needs_them_is_left_out(self, heading, without_operators):
        assert says(without_operators, heading)

    @quotes('MMCV==... is used but incompatible. Please install mmcv>=...')
    def test_another_mmcv(self, heading, tmp_path):
        code = "import mmcv; mmcv.__version__ = '9.9.9'; import cenet_mmdet.models.mmpretrain"
        assert says(run(sys.executable, '-c', code, cwd=tmp_path, check=False).stderr, heading)

    @quotes('faster_coco_eval is not installed, metrics will not be computed')
    def test_the_other_metric(self, heading):
        module = pytest.importorskip('mmdet.evaluation.metrics.faster_coco_metric',
                                     reason='mmdet 3.3 has no such metric')
        if importlib.util.find_spec('faster_coco_eval'):
            pytest.skip('faster_coco_eval is installed')
        # once more, which ends where it would register its metric a second time
        assert says(warned(raised, runpy.run_path, module.__file__), heading)

    IMPORTED_BY_NOBODY = f'''
import mmdet.models
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
init_default_scope('mmdet')
for attempt in (
        lambda: MODELS.build(dict(type='CEResNet', depth=50)),
        lambda: MODELS.build(dict(type='ResNet', depth=50, plugins=[{PLUGIN}])),
        lambda: CheckpointLoader.load_checkpoint('torchvision://resnet50')):
    try:
        attempt()
    except Exception as error:
        print(error)
'''

    @pytest.fixture(scope='class')
    @classmethod
    def not_imported(cls, tmp_path_factory):
        return run(sys.executable, '-W', 'ignore', '-c', cls.IMPORTED_BY_NOBODY,
                   cwd=tmp_path_factory.mktemp('cwd')).stdout

    @quotes('CEResNet is not in the mmdet::model registry')
    def test_backbone(self, heading, not_imported):
        assert says(not_imported, heading)

    @quotes('Cannot find None in registry under scope name')
    def test_plugin(self, heading, not_imported):
        assert says(not_imported, heading)

    @pytest.mark.skipif(importlib.util.find_spec('torchvision') is not None,
                        reason='torchvision is installed')
    @quotes("No module named 'torchvision'")
    def test_torchvision(self, heading, not_imported):
        assert says(not_imported, heading)


class TestConfig:

    @quotes('Failed to import custom modules from')
    def test_not_installed(self, heading, tmp_path):
        path = tmp_path / 'mine.py'
        path.write_text("custom_imports = dict(imports=['cenet_mmdet_that_is_not_there'])")
        assert says(raised(Config.fromfile, path), heading)

    @quotes('Not implemented yet.')
    def test_plugins_in_resnet_18(self, heading):
        init_default_scope('mmdet')
        assert says(raised(MODELS.build, dict(type='ResNet', depth=18, plugins=[PLUGIN])), heading)

    @quotes("where='...' selects no normalization layer. There are:")
    def test_where(self, heading):
        assert says(raised(insert_ce, ResNet(18, **SLIM), where='bn2'), heading)

    @quotes('Index ... exceeds the length of list')
    def test_appending_to_a_list(self, heading):
        cfg = Config.fromfile(ROOT / 'configs/mask_rcnn_ce_r50.py')
        assert says(raised(cfg.merge_from_dict, {'custom_hooks.1.type': 'ChannelHealthHook'}),
                    heading)


class TestDataAndWeights:

    @pytest.fixture
    def cfg(self, shapes, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(shapes))
        return Config.fromfile(ROOT / 'configs/mask_rcnn_ce_r50.py')

    @quotes('annotations not found: ... Set COCO_ROOT to the folder')
    def test_no_data(self, heading, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', '/nowhere')
        cfg = Config.fromfile(ROOT / 'configs/mask_rcnn_ce_r50.py')
        assert says(missing_files(cfg, ('val', ))[0], heading)

    @quotes('need at least one array to concatenate')
    def test_other_class_names(self, heading, cfg):
        init_default_scope('mmdet')
        assert says(raised(DATASETS.build, cfg.train_dataloader.dataset), heading)

    @quotes('list index out of range')
    def test_more_classes_than_names(self, heading, cfg):
        init_default_scope('mmdet')
        metric = METRICS.build(dict(cfg.val_evaluator, metric='bbox'))
        metric.dataset_meta = dict(classes=CLASSES)
        metric.process({}, [dict(
            img_id=1, ori_shape=(320, 320), pred_instances=dict(
                bboxes=torch.tensor([[0., 0, 9, 9]]), scores=torch.tensor([.5]),
                labels=torch.tensor([7])))])
        assert says(raised(metric.evaluate, 1), heading)

    @quotes('pretrained weights not found: ... name it in the environment variable that the '
            'config reads')
    def test_no_weights(self, heading, cfg):
        cfg.model.backbone.init_cfg.checkpoint = '/nowhere.pth'
        assert says(missing_files(cfg, ('train', ))[0], heading)

    @quotes('pretrained weights damaged: ... is truncated or was not written by torch.save')
    def test_damaged_weights(self, heading, cfg, tmp_path):
        path = tmp_path / 'half.pth'
        torch.save(torch.zeros(1000), path)
        path.write_bytes(path.read_bytes()[:2000])
        cfg.model.backbone.init_cfg.checkpoint = str(path)
        assert says(missing_files(cfg, ('train', ))[0], heading)

    @quotes('Weights only load failed')
    def test_weights_only(self, heading, tmp_path):
        torch.save(dict(message_hub=HistoryBuffer()), tmp_path / 'epoch_1.pth')
        assert says(raised(torch.load, tmp_path / 'epoch_1.pth', weights_only=True), heading)

    @quotes('the checkpoint holds no CE layers: ... start at their initial values')
    def test_a_plain_resnet(self, heading, log):
        CEResNet(18, **SLIM).load_state_dict(ResNet(18, **SLIM).state_dict(), strict=False)
        assert says(log.text, heading)

    @quotes("CE layers with freeze='all' have statistics that were never loaded or trained")
    def test_frozen_and_unset(self, heading):
        backbone = CEResNet(18, ce_cfg=dict(freeze='all'), **SLIM)
        assert says(raised(backbone, torch.zeros(1, 3, 32, 32)), heading)

    @quotes('CE layers run on initial statistics (W = I, s = 1), as their stage is frozen')
    def test_frozen_stages(self, heading, log):
        CEResNet(18, frozen_stages=1, **SLIM).train()
        backbone = CEResNet(18, frozen_stages=1, **SLIM)
        backbone.train()
        backbone(torch.randn(2, 3, 32, 32))
        assert says(log.text, heading)

    @quotes('the CE layers of the checkpoint are not those of this network')
    def test_other_ce_layers(self, heading):
        other = CEResNet(18, ce_cfg=dict(group_size=4), **SLIM).state_dict()
        assert says(raised(CEResNet(18, **SLIM).load_state_dict, other), heading)

    @quotes('holds a whole model, in which ResNet would find none of its weights')
    def test_whole_model(self, heading, shapes, tmp_path, monkeypatch):
        torch.save({'backbone.conv1.weight': torch.zeros(1)}, tmp_path / 'whole.pth')
        monkeypatch.setenv('COCO_ROOT', str(shapes))
        monkeypatch.setenv('RESNET50_CHECKPOINT', str(tmp_path / 'whole.pth'))
        cfg = Config.fromfile(ROOT / 'configs/mask_rcnn_r50.py')
        assert says(missing_files(cfg, ('train', ))[0], heading)

    @quotes('not a checkpoint that a run can be resumed from: ... has no')
    def test_bare_weights(self, heading, cfg, tmp_path):
        torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
        cfg.update(resume=True, load_from=str(tmp_path / 'weights.pth'))
        assert says(missing_files(cfg, ())[0], heading)

    @quotes('cannot resume from the checkpoint of another model')
    def test_another_model(self, heading):
        runner = SimpleNamespace(cfg=dict(resume=True), model=CE(16))
        checkpoint = dict(state_dict=CE(32).state_dict())
        assert says(raised(ExactResumeHook().after_load_checkpoint, runner, checkpoint), heading)


class TestTraining:

    @quotes('loss: nan')
    def test_far_too_high_a_learning_rate(self, heading):
        """And the statistics stay finite, as the page says of the next message."""
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), CE(32), nn.ReLU(),
                                nn.Conv2d(32, 32, 3))
        for _ in range(10):
            loss = network(torch.randn(4, 3, 8, 8)).square().mean()
            parameters = list(network.parameters())
            with torch.no_grad():
                for p, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
                    p -= 1e12 * grad
        assert says(f'loss: {loss:.4f}', heading)
        assert all(buffer.isfinite().all() for buffer in network[2].buffers())

    def test_first_gradients_behind_a_gamma_of_zero(self):
        """Why plugins from scratch want zero_init_residual=False."""
        init_default_scope('mmdet')
        norms = []
        for plugins in ([PLUGIN], None):
            torch.manual_seed(0)
            backbone = MODELS.build(dict(type='ResNet', depth=50, plugins=plugins,
                                         norm_eval=False, **SLIM))
            for module in backbone.modules():
                if isinstance(module, Bottleneck):  # what zero_init_residual=True does
                    nn.init.zeros_(module.bn3.weight)
            backbone.train()
            backbone(torch.randn(4, 3, 64, 64))[2].mean().backward()
            norms.append(sum(block.bn3.weight.grad.norm() for block in backbone.layer3))
        assert norms[0] > 3 * norms[1]

    @quotes('samples with inf or NaN are left out of its statistics')
    def test_infinite_sample(self, heading):
        x = torch.randn(2, 16, 4, 4)
        x[0, 0, 0, 0] = float('inf')
        assert says(warned(CE(16), x), heading)

    @quotes('% of the channels behind ... are inhibited')
    def test_inhibited(self, heading, caplog):
        logger = MMLogger.get_instance('inhibited')
        logger.addHandler(caplog.handler)
        model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
        nn.init.zeros_(model[0].weight)
        nn.init.constant_(model[0].bias, -1)
        runner = SimpleNamespace(model=model, iter=0, logger=logger, visualizer=SimpleNamespace(
            add_scalars=lambda *_, **__: None))
        hook = ChannelHealthHook(interval=1)
        hook.before_train(runner)
        hook.before_train_iter(runner, 0)
        model(torch.randn(2, 3, 8, 8))
        hook.after_train_iter(runner, 0)
        assert says(caplog.text, heading)

    @quotes('Expected to have finished reduction in the prior iteration before starting a new one')
    def test_unused_stage(self, heading, process_group):
        """And with num_stages, as the page says, none is unused."""
        images = torch.randn(2, 3, 32, 32)

        def two_steps(**stages):
            model = DistributedDataParallel(CEResNet(18, out_indices=(2, ), **stages, **SLIM))
            for _ in range(2):
                model(images)[0].mean().backward()

        assert says(raised(two_steps), heading)
        two_steps(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1))

    @quotes('The server socket has failed to listen on any local network address')
    def test_port_in_use(self, heading):
        first = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
        assert says(raised(dist.TCPStore, '127.0.0.1', first.port, is_master=True,
                           wait_for_workers=False), heading)

    @pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
    @quotes('--amp needs a GPU')
    def test_amp(self, heading, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / 'tools')
        monkeypatch.setattr(sys, 'argv', ['train.py', 'config.py', '--amp'])
        from _mmdet import _adapt_to_cpu
        with pytest.raises(SystemExit) as exit_:
            _adapt_to_cpu()
        assert says(exit_.value, heading)

    @quotes('SyncBN needs GPUs: on CPU each process normalizes by its own batch')
    def test_sync_bn(self, heading, process_group, log):
        CPUDistributedDataParallel(nn.Sequential(nn.SyncBatchNorm(4)))
        assert says(log.text, heading)

    @quotes('ExactResumeHook needs data workers that start anew with each epoch')
    def test_persistent_workers(self, heading):
        loader = torch.utils.data.DataLoader(range(2), num_workers=1, persistent_workers=True)
        assert says(raised(ExactResumeHook().before_train,
                           SimpleNamespace(train_dataloader=loader)), heading)

    @quotes('this channels_last input is copied to NCHW')
    def test_channels_last(self, heading):
        from cenet_mmdet.layers import grouping
        grouping._told_of_channels_last = False
        x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
        assert says(warned(CE(16), x), heading)
