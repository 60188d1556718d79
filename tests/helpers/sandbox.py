"""A small world in which the commands of the pages run as typed, in seconds each, on a CPU.

Data and weights lie where the pages have them, /data being a folder of the world. Configs,
tools and file names are the real ones: the configs are copies that end in a few lines which
make model and images small, and `python` and `torchrun` are the real ones behind a stand-in
that adds sizes, notes the command, and copies the last checkpoint to the name that a longer
run would have given it.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from cenet_mmdet import CE, CEResNet
from cenet_mmdet.checkpoint.convert import to_released

# What cannot run here, by a part of its command, and why.
NOT_HERE = {
    'srun': 'needs Slurm; test_tools.py has a stand-in for it',
    '--amp': 'needs a GPU',
    '--nnodes=2': 'needs two machines',
    'configs/cifar10': 'needs CIFAR-10; test_pretrain.py trains on generated files',
    'make demo': 'sets up an environment; test_tools.py runs the demo',
    'make test': 'runs this test',
    'pip install': 'changes the environment of the tests; test_packaging.py installs elsewhere',
    'benchmark.py layers': 'minutes for timings; test_tools.py runs benchmark.py',
}

# The last options win, and make a run small.
SIZES = {
    'make_demo_data.py': ['--train', '8', '--val', '4'],
    'deploy.py': ['--size', '64', '96'],
    'get_flops.py': ['--size', '64', '64'],
    'benchmark.py': ['--size', '64', '96', '--repeats', '1'],
    'analyze_channels.py': ['--images', '2'],
}

SMALL_DETECTOR = '''
model['backbone'].update(base_channels=8, stem_channels=8)
model['neck'] = dict(in_channels=[32, 64, 128, 256], out_channels=32)
model['rpn_head'] = dict(in_channels=32, feat_channels=32)
model['roi_head'] = dict(
    bbox_roi_extractor=dict(out_channels=32), mask_roi_extractor=dict(out_channels=32),
    bbox_head=dict(in_channels=32, fc_out_channels=64),
    mask_head=dict(in_channels=32, conv_out_channels=32))
model['train_cfg'] = dict(rpn_proposal=dict(max_per_img=20), rcnn=dict(sampler=dict(num=8)))
model['test_cfg'] = dict(rcnn=dict(score_thr=0.001, max_per_img=5))
train_cfg = dict(max_epochs=1)
'''
SMALL_IMAGES = '''
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(128, 96)),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 96)),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader['dataset'].update(pipeline=train_pipeline, indices=4)
train_dataloader.update(num_workers=0)
for loader in (val_dataloader, test_dataloader):
    loader['dataset'].update(pipeline=test_pipeline)
    loader.update(num_workers=0, persistent_workers=False)
'''
SMALL_CLASSIFIER = '''
classes = ('cross', 'disk', 'square', 'star', 'triangle')
train_pipeline[1]['scale'] = 32
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset'].update(metainfo=dict(classes=classes))
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=1)
'''
SMALL_DEMO = '''
train_cfg.update(max_epochs=1, val_interval=1)
param_scheduler[1]['T_max'] = 1
default_hooks['checkpoint']['interval'] = 1
'''
ENDINGS = {
    'configs/_base_/coco_instance.py': SMALL_IMAGES,
    'configs/mask_rcnn_r50.py': SMALL_DETECTOR,
    'configs/_base_/imagenet.py': SMALL_CLASSIFIER,
    'configs/demo/ce_r18_shapes_classifier.py': (
        "train_cfg = dict(max_epochs=1)\nparam_scheduler[1]['T_max'] = 1\n"
        "default_hooks['checkpoint']['interval'] = 1\n"),
    'configs/demo/mask_rcnn_ce_r18_shapes.py': SMALL_DEMO,
}

STANDIN = '''#!{python}
import json, os, subprocess, sys
from pathlib import Path

standin = Path(sys.argv[0]).absolute()
command, world = [standin.name, *sys.argv[1:]], standin.parent.parent
line = ' '.join(command)
reason = next((why for part, why in {not_here!r}.items() if part in line), None)
with open(world / 'commands.jsonl', 'a') as notes:
    notes.write(json.dumps([line, reason]) + chr(10))
if reason:
    sys.exit()
for name, value in os.environ.items():
    if value.startswith('/data/'):
        os.environ[name] = str(world) + value
os.environ.pop('COCO_YEAR', None)
os.environ['PATH'] = {path!r}
arguments, config = [], 'configs/mask_rcnn_ce_r50.py'
for part in command[1:]:
    if part in ('CONFIG', 'CHECKPOINT', 'CE_CHECKPOINT'):
        part = config if part == 'CONFIG' else f'work_dirs/{{Path(config).stem}}/epoch_24.pth'
    elif part.startswith('/data/'):
        part = str(world) + part
    elif part.startswith('configs/'):
        config = part
    arguments.append(part)
tool = next((Path(part).name for part in arguments if part.endswith('.py')), '')
arguments += {sizes!r}.get(tool, [])
if command[0] == 'torchrun':
    arguments = ['--nproc-per-node=2' if part.startswith('--nproc') else part
                 for part in arguments]
    arguments = ['-m', 'torch.distributed.run', *arguments]
elif command[0] == 'cenet-mmdet':
    arguments = ['-m', 'cenet_mmdet', *arguments]
status = subprocess.call([sys.executable, *arguments])
for checkpoint in Path().glob('work_dirs/*/epoch_1.pth'):
    for epoch in (4, 10, 24, 100):
        longer = checkpoint.with_name(f'epoch_{{epoch}}.pth')
        if not longer.exists():
            longer.symlink_to(checkpoint.name)
sys.exit(status)
'''


def build(folder: Path) -> Path:
    """The world, in a new folder."""
    folder.mkdir()
    (folder / 'tools').symlink_to(ROOT / 'tools')
    (folder / 'cenet_mmdet').symlink_to(ROOT / 'cenet_mmdet')
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    shutil.copytree(ROOT / 'docs', folder / 'docs')
    for name, ending in ENDINGS.items():
        with open(folder / name, 'a') as config:
            config.write(ending)
    _standins(folder)
    _data(folder)
    _weights(folder)
    return folder


def _standins(folder):
    (folder / 'bin').mkdir()
    for name in ('python', 'torchrun', 'srun', 'pip', 'make', 'cenet-mmdet'):
        path = folder / 'bin' / name
        path.write_text(STANDIN.format(
            python=sys.executable, not_here=NOT_HERE, sizes=SIZES,
            path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}'))
        path.chmod(0o755)


def _data(folder):
    """The shapes under COCO's first names, so that COCO's own configs read them; crops of them."""
    from mmdet.datasets import CocoDataset

    data = folder / 'data'
    data.mkdir()
    tool('dev/make_demo_data.py', data / 'shapes', '--train', 10, '--val', 4)
    tool('dev/crop_objects.py', data / 'shapes', data / 'imagenet')
    shutil.copytree(data / 'shapes', data / 'coco')
    names = CocoDataset.METAINFO['classes']
    for path in (data / 'coco/annotations').iterdir():
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=index + 1, name=name) for index, name in enumerate(names)]
        path.write_text(json.dumps(content))
    shutil.copytree(data / 'shapes/val2017', folder / 'photos')
    shutil.copytree(data / 'shapes', data / 'demo')  # what `make demo` leaves


def _weights(folder):
    """Checkpoints that the pages take as given."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    weights = {}
    for name in ('mask_rcnn_r50', 'mask_rcnn_ce_r50', 'mask_rcnn_r101', 'mask_rcnn_ce_r101'):
        model = _trained(MODELS.build(Config.fromfile(folder / f'configs/{name}.py').model))
        weights[name] = model.backbone.state_dict()
        path = folder / 'work_dirs' / name / 'epoch_24.pth'
        path.parent.mkdir(parents=True)
        torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    for name, row in (('ce_resnet50.pth', 'mask_rcnn_ce_r50'),
                      ('ce_resnet101.pth', 'mask_rcnn_ce_r101'),
                      ('resnet50-torchvision.pth', 'mask_rcnn_r50'),
                      ('resnet101-torchvision.pth', 'mask_rcnn_r101')):
        torch.save(weights[row], folder / 'data' / name)
    full = _trained(CEResNet(50)).state_dict()
    torch.save(dict(state_dict=to_released(full)), folder / 'ce_resnet50.pth.tar')
    for name, state in (('ce_resnet50', full), ('ce_resnet101', weights['mask_rcnn_ce_r101'])):
        (folder / 'work_dirs' / name).mkdir()
        torch.save(dict(state_dict={f'backbone.{key}': value for key, value in state.items()}),
                   folder / 'work_dirs' / name / 'epoch_100.pth')


def _trained(model):
    """The model with CE statistics that count as set."""
    for module in model.modules():
        if isinstance(module, CE):
            module.num_batches_tracked.fill_(1)
    return model


def run(script: str, folder: Path, environment) -> subprocess.CompletedProcess:
    """Run a page's commands by bash in the world."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    return subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', script], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**environment, 'PATH': f'{folder}/bin:{os.environ["PATH"]}',
                                       'OMP_NUM_THREADS': '1', 'PORT': port})
