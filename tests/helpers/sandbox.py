"""A folder in which the commands of the pages run as typed, in seconds each, on a CPU.

/data is a folder of the sandbox. The configs are copies that end in lines which make models and
images small. The programs in bin/ are this file, which starts the real ones.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {'python': [], 'torchrun': ['-m', 'torch.distributed.run'],
            'cenet-mmdet': ['-m', 'cenet_mmdet'], 'pip': [], 'make': [], 'srun': []}
# Commands that are not started, by a part of them, and why.
LEFT_OUT = {
    'srun': 'needs Slurm',
    '--amp': 'needs a GPU',
    '--nnodes=2': 'needs two machines',
    'configs/cifar10': 'needs CIFAR-10',
    'make ': 'sets up an environment',
    'pip ': 'changes the environment of the tests',
    'benchmark.py layers': 'takes minutes',
}
# Options behind those of a command make a run small, as do the lines at the end of a config.
SIZES = {'make_demo_data.py': ['--train', '8', '--val', '4'], 'deploy.py': ['--size', '64', '96'],
         'benchmark.py': ['--size', '64', '96', '--repeats', '1'],
         'analyze_channels.py': ['--images', '2']}
SHAPES = ('disk', 'square', 'triangle', 'star', 'cross')
LOADERS = '''
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset']['metainfo'] = dict(classes={})
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
'''
IMAGES = LOADERS.format(SHAPES) + '''
def small(pipeline):
    return [dict(step, scale=(128, 96)) if step['type'] == 'Resize' else step for step in pipeline]
train_dataloader['dataset'].update(pipeline=small(_base_.train_pipeline), indices=4)
for loader in (val_dataloader, test_dataloader):
    loader['dataset']['pipeline'] = small(_base_.test_pipeline)
'''
DETECTOR = '''
width = dict(out_channels=32)
model['backbone'].update(base_channels=8, stem_channels=8)
model.update(
    neck=dict(in_channels=[32, 64, 128, 256], **width),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=width, bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=5),
        mask_roi_extractor=width, mask_head=dict(in_channels=32, num_classes=5)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20), rcnn=dict(sampler=dict(num=8))),
    test_cfg=dict(rcnn=dict(score_thr=0.001, max_per_img=5)))
train_cfg = dict(max_epochs=1)
'''
CLASSIFIER = LOADERS.format(sorted(SHAPES)) + 'train_cfg = dict(max_epochs=1)\n'
DEMO = ('train_cfg.update(max_epochs=1, val_interval=1)\n'
        "param_scheduler[1]['T_max'] = default_hooks['checkpoint']['interval'] = 1\n")
ENDINGS = {'_base_/coco_instance': IMAGES, '_base_/imagenet': CLASSIFIER, 'mask_rcnn_r50': DETECTOR,
           'demo/ce_r18_shapes_classifier': DEMO, 'demo/mask_rcnn_ce_r18_shapes': DEMO}


def commands(script: str, folder: Path) -> list[list[str]]:
    """What bash, in a new folder, would start for a script and the launchers that it calls."""
    for name in ('configs', 'docs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    lines = _bash(script, folder).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(tuple(PROGRAMS))]


def run(script: str, new_sandbox: Path, folder: Path) -> None:
    """Run a script by bash in a copy of a sandbox; an AssertionError has the output if it fails."""
    shutil.copytree(new_sandbox, folder, symlinks=True)
    _bash(script, folder, SANDBOX=str(folder), PORT=str(20000 + os.getpid() % 20000),
          OMP_NUM_THREADS='1', COCO_ROOT='/data/coco',
          CE_RESNET50_CHECKPOINT='/data/ce_resnet50.pth',
          RESNET50_CHECKPOINT='/data/resnet50-torchvision.pth')


def build(folder: Path) -> Path:
    """A new sandbox, with data and weights under the names that they have in the pages."""
    import torch
    from conftest import tool
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from cenet_mmdet import CE, CEResNet

    def save(model, name):
        for module in model.modules():
            if isinstance(module, CE):
                module.num_batches_tracked.fill_(1)  # else CE refuses to run on its statistics
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / name)

    for name in ('cenet_mmdet', 'configs', 'docs', 'tools'):  # the package finds configs beside it
        shutil.copytree(ROOT / name, folder / name)
    for name, ending in ENDINGS.items():
        with open(folder / f'configs/{name}.py', 'a') as config:
            config.write(ending)
    tool('dev/make_demo_data.py', folder / 'data/demo', '--train', 10, '--val', 4)
    tool('dev/crop_objects.py', folder / 'data/demo', folder / 'data/imagenet')
    shutil.copytree(folder / 'data/demo', folder / 'data/coco')
    shutil.copytree(folder / 'data/demo/val2017', folder / 'photos')
    init_default_scope('mmdet')
    for row, weights in (('r50', 'resnet50-torchvision'), ('r101', 'resnet101-torchvision'),
                         ('ce_r50', 'ce_resnet50'), ('ce_r101', 'ce_resnet101')):
        model = MODELS.build(Config.fromfile(folder / f'configs/mask_rcnn_{row}.py').model)
        save(model, f'work_dirs/mask_rcnn_{row}/epoch_24.pth')
        save(model.backbone, f'data/{weights}.pth')
    save(model, 'work_dirs/ce_resnet101/epoch_100.pth')
    save(CEResNet(50), 'work_dirs/ce_resnet50/epoch_100.pth')
    tool('convert_checkpoint.py', folder / 'work_dirs/ce_resnet50/epoch_100.pth',
         folder / 'ce_resnet50.pth.tar', '--to', 'released')
    return folder


def _bash(script: str, folder: Path, **environment: str) -> str:
    (folder / 'bin').mkdir()
    for name in PROGRAMS:
        (folder / 'bin' / name).write_text(
            f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / 'bin' / name).chmod(0o755)
    environment = {**os.environ, 'PATH': f'{folder}/bin:{os.environ["PATH"]}', **environment}
    result = subprocess.run(['bash', '-euo', 'pipefail', '-c', script], cwd=folder, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-20000:]
    return result.stdout


def _start(program: str, *arguments: str) -> int:
    """Print a command and, in a sandbox, start it; its exit status."""
    command, folder = shlex.join((program, *arguments)), os.environ.get('SANDBOX')
    print(command, flush=True)
    if not folder or any(part in command for part in LEFT_OUT):
        return 0
    config = ['configs/mask_rcnn_ce_r50.py', *filter(re.compile('configs/').match, arguments)][-1]
    known = {'CONFIG': config, 'CHECKPOINT': f'work_dirs/{Path(config).stem}/epoch_24.pth',
             'CE_CHECKPOINT': 'work_dirs/mask_rcnn_ce_r50/epoch_24.pth'}
    sizes = [size for tool in SIZES if tool in command for size in SIZES[tool]]
    arguments = [re.sub('^/data/', f'{folder}/data/', known.get(part, part)) for part in arguments]
    arguments = [re.sub('^(--nproc-per-node=).*', r'\g<1>2', part) for part in arguments]
    environment = {name: re.sub('^/data/', f'{folder}/data/', value)
                   for name, value in os.environ.items() if name != 'COCO_YEAR'}  # is 2017 here
    status = subprocess.call([sys.executable, *PROGRAMS[program], *arguments, *sizes],
                             env=environment)
    for checkpoint in Path().glob('work_dirs/*/epoch_1.pth'):
        for epoch in (4, 10, 24, 100):  # the last epoch of longer runs
            if not checkpoint.with_name(f'epoch_{epoch}.pth').exists():
                checkpoint.with_name(f'epoch_{epoch}.pth').symlink_to(checkpoint.name)
    return status


if __name__ == '__main__':
    sys.exit(_start(*sys.argv[1:]))
