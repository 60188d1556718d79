"""Each message that docs/troubleshoot.md has as a heading is one that users really get."""
import copy
import functools
import json
import os
import re
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import mmcv
import pytest
import torch
import torch.distributed as dist
from conftest import LEGACY, ROOT, run, run_here
from mmdet.models import ResNet
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.checkpoint.load import CAN_ALLOW, load
from cenet_mmdet.checkpoint.resumable import check_resumable
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel
from cenet_mmdet.engine.job import job_problems
from cenet_mmdet.models.build import load_config

HEADINGS = re.findall(r'^#+ `(.+)`$', (ROOT / 'docs/troubleshoot.md').read_text(), re.MULTILINE)
# Parts of headings that need another environment, which one, and whether it is not this one.
ELSEWHERE = [
    ('torchvision::nms|pkg_resources|NumPy 1.x', 'releases that do not fit together', True),
    ("named 'torchvision'|needs torchvision", 'no torchvision', find_spec('torchvision')),
    ('faster_coco_eval', 'mmdet 3.5 alone', LEGACY or find_spec('faster_coco_eval')),
    ('--amp', 'no GPU', torch.cuda.is_available()),
    ('holds more than weights', 'torch before 2.6', CAN_ALLOW),
    ('neither a weight', 'torch 2.6', not CAN_ALLOW),
]
CONFIG = ROOT / 'configs/mask_rcnn_ce_r50.py'
WEIGHTS = 'model.backbone.init_cfg.checkpoint'
CLASSES = 'train_dataloader.dataset.metainfo.classes'
PLUGIN = dict(cfg=dict(type='CE'), stages=(True, True, True, False), position='after_conv3')


def process(folder, line, *names):
    """What a new Python process says where a line is tried with each of the names."""
    code = ''.join(f'try: {line % name}\nexcept Exception: print_exc()\n' for name in names)
    return run(sys.executable, '-c', f'from traceback import print_exc\n{code}', cwd=folder).stderr


def broken_mmcv(folder):
    """Imports with an mmcv of another version and without operators."""
    shutil.copytree(mmcv.__path__[0], folder / 'mmcv',
                    ignore=shutil.ignore_patterns('_ext*', 'csrc'))
    with open(folder / 'mmcv/version.py', 'a') as version:
        version.write("__version__ = '9.9.9'\n")
    return process(folder, 'import %s', 'cenet_mmdet', 'mmcv.ops')


def not_imported(folder):
    code = ('import mmdet.evaluation, mmdet.models; from mmdet.registry import MODELS; '
            f"MODELS.build(dict(type='%s', depth=50, plugins=[{PLUGIN}]))")
    return process(folder, code, 'CEResNet', 'ResNet')


@functools.cache
def demo_config():
    return load_config(ROOT / 'configs/demo/mask_rcnn_ce_r18_shapes_pretrained.py')


def problems(options):
    cfg = copy.deepcopy(demo_config())
    cfg.merge_from_dict(options)
    return '\n'.join(job_problems(cfg))


def saved(folder, content):
    torch.save(content, folder / 'saved.pth')
    return str(folder / 'saved.pth')


def changed(change, option='train_dataloader.dataset.ann_file'):
    """Problems with an annotation file after a change, where the option names it."""
    def provoke(folder):
        path = Path(os.environ['COCO_ROOT'], 'annotations/instances_train2017.json')
        content = json.loads(path.read_text())
        change(content)
        (folder / 'changed.json').write_text(json.dumps(content))
        return problems({option: str(folder / 'changed.json')})
    return provoke


def rename_image(content):
    content['images'][0]['file_name'] = 'elsewhere.jpg'


def resize_image(content):
    content['images'][0]['height'] += 1


def drop_iscrowd(content):
    for annotation in content['annotations']:
        del annotation['iscrowd']


def evaluated_classes_that_the_file_lacks(_):
    metric = METRICS.build(dict(load_config(CONFIG).val_evaluator, metric='bbox'))
    metric.dataset_meta = dict(classes=('disk', 'person'))
    found = dict(bboxes=torch.eye(4)[:1], scores=torch.ones(1), labels=torch.tensor([1]))
    metric.process({}, [dict(img_id=1, ori_shape=(320, 320), pred_instances=found)])
    metric.evaluate(1)


class Model(BaseModel):
    def forward(self, inputs, mode):
        return dict(loss=self.layers(torch.stack(inputs)).square().mean())


def train(folder, hook, workers=0, **options):
    """Train a network with inhibited channels at far too high a learning rate."""
    model = Model()
    model.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                                 nn.Conv2d(4, 4, 3))
    model.layers[1].bias.data[1:] = -10
    loader = dict(dataset=[dict(inputs=torch.randn(3, 8, 8))] * 2, num_workers=workers,
                  batch_size=2, persistent_workers=workers > 0, sampler=dict(type='DefaultSampler'))
    Runner(model, str(folder), loader, train_cfg=dict(by_epoch=True, max_epochs=4),
           optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e30)), custom_hooks=[hook],
           default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
           cfg=options, **options).train()


def refused(folder, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        result = run_here(patch, 'train.py', CONFIG, *arguments, cwd=folder)
    assert result.returncode == 1 and not (folder / 'work_dirs').exists()
    return result.stderr


def distributed(folder):
    dist.init_process_group('gloo', f'file://{folder}/rendezvous', rank=0, world_size=1)
    try:
        CPUDistributedDataParallel(nn.Sequential(nn.SyncBatchNorm(4)))
        unused_stage = nn.parallel.DistributedDataParallel(CEResNet(18, out_indices=(2, )))
        for _ in range(2):
            unused_stage(torch.randn(2, 3, 32, 32))[0].mean().backward()
    finally:
        dist.destroy_process_group()


PROVOCATIONS = [
    broken_mmcv,
    not_imported,
    lambda _: CheckpointLoader.load_checkpoint('torchvision://resnet50'),
    lambda _: Config.fromstring("custom_imports = dict(imports=['not_installed'])", '.py'),
    lambda _: MODELS.build(dict(type='ResNet', depth=18, plugins=[PLUGIN])),
    lambda _: insert_ce(ResNet(18), where='bn2'),
    lambda _: insert_ce(nn.Sequential(nn.LayerNorm(4)), where='.*'),
    lambda _: problems({'custom_hooks.9.type': 'ChannelHealthHook'}),
    lambda _: problems({'train_dataloader.dataset.data_root': '/nowhere/'}),
    lambda _: DATASETS.build(load_config(CONFIG).train_dataloader.dataset),
    evaluated_classes_that_the_file_lacks,
    lambda _: problems({CLASSES: ('disk', 'person')}),
    lambda _: problems({CLASSES: ('square', 'disk')}),
    lambda _: problems({CLASSES: 'disk'}),
    changed(drop_iscrowd),
    changed(rename_image),
    changed(resize_image),
    changed(rename_image, 'val_evaluator.ann_file'),
    lambda _: problems({WEIGHTS: '/nowhere.pth'}),
    lambda _: problems({WEIGHTS: str(CONFIG)}),
    lambda _: problems({WEIGHTS: 'torchvision://resnet18'}),
    lambda folder: load(saved(folder, Path())),
    lambda folder: torch.load(saved(folder, HistoryBuffer()), weights_only=True),
    lambda folder: problems({WEIGHTS: saved(folder, {'backbone.conv1.weight': torch.zeros(1)}),
                             'model.backbone.type': 'ResNet'}),
    lambda folder: check_resumable(saved(folder, dict(state_dict={}))),
    lambda _: check_resumable(CONFIG),
    lambda _: CEResNet(18).load_state_dict(ResNet(18).state_dict(), strict=False),
    lambda _: CEResNet(18, ce_cfg=dict(freeze='all'))(torch.zeros(1, 3, 32, 32)),
    lambda _: CEResNet(18, frozen_stages=1)(torch.randn(2, 3, 32, 32)),
    lambda _: CEResNet(18).load_state_dict(CEResNet(18, ce_cfg=dict(group_size=4)).state_dict()),
    lambda folder: train(folder, dict(type='ChannelHealthHook', interval=1)),
    lambda folder: train(folder, dict(type='ExactResumeHook'), workers=1),
    lambda folder: train(folder, dict(type='ExactResumeHook'), resume=True,
                         load_from=saved(folder, dict(state_dict={}))),
    distributed,
    lambda _: [dist.TCPStore('127.0.0.1', 29599, is_master=True, wait_for_workers=False)
               for _ in range(2)],
    lambda folder: refused(folder, '--amp'),
    lambda folder: refused(folder, '--auto-scale-lr', '--cfg-options',
                           'auto_scale_lr._delete_=True'),
    lambda _: CE(16)(torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)),
]


def said(provoke, folder):
    """What a function returns, warns of, logs or raises."""
    MMLogger.get_instance(folder.name, log_file=str(folder / 'said.log'))  # the current one now
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        try:
            answer = provoke(folder)
        except Exception as error:
            answer = error
    logs = [path.read_text() for path in folder.rglob('*.log')]
    return '\n'.join(map(str, [answer, *logs, *(warning.message for warning in found)]))


@pytest.fixture(scope='module')
def messages(shapes, tmp_path_factory):
    init_default_scope('mmdet')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('COCO_ROOT', str(shapes))
        return [said(provoke, tmp_path_factory.mktemp('said')) for provoke in PROVOCATIONS]


@pytest.mark.parametrize('heading', HEADINGS or ['there are headings'])
def test_heading_is_a_message(heading, messages):
    for part, environment, is_other in ELSEWHERE:
        if is_other and re.search(part, heading):
            pytest.skip(f'needs {environment}')
    pattern = '.*'.join(map(re.escape, heading.split('...')))
    assert any(re.search(pattern, text) for text in messages), 'none of PROVOCATIONS says it'
