"""The command lines as users type them, from a working directory of their own."""
import json
import os
import re

import pytest
import torch
from conftest import ROOT, run, tool
from pycocotools.coco import COCO

CONFIG = ROOT / 'configs' / 'mask_rcnn_ce_r50.py'
CLASSES = ['--cfg-options', *(
    f'{split}_dataloader.dataset.metainfo.classes=disk,square,triangle,star,cross'
    for split in ('train', 'val'))]
DEMO_CONFIG = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes.py'
PYTHON_TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('[a-z]*.py'))
SHELL_TOOLS = ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh']


class TestHelp:

    @pytest.mark.parametrize('name', PYTHON_TOOLS)
    def test_python_tools_show_an_example(self, name, tool_here, tmp_path):
        result = tool_here(name, '--help', cwd=tmp_path)
        assert result.returncode == 0
        assert re.search(rf'python3? tools/{name}', result.stdout)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize('name', SHELL_TOOLS)
    def test_shell_tools_show_an_example(self, name, tmp_path):
        out = run(ROOT / 'tools' / name, '--help', cwd=tmp_path).stdout
        assert out.count(f'tools/{name}') >= 2

    @pytest.mark.parametrize(('arguments', 'status', 'message'), [
        *(([name], 2, f'tools/{name}') for name in SHELL_TOOLS),
        (['dist_train.sh', CONFIG, 'eight'], 2, "got 'eight'"),
        (['slurm_train.sh', 'gpu', 'job', CONFIG, 'work'], 1, 'srun not found')])
    def test_shell_tools_refuse_other_arguments(self, arguments, status, message):
        result = run(ROOT / 'tools' / arguments[0], *arguments[1:], check=False)
        assert result.returncode == status
        assert message in result.stderr


def test_slurm_command_line(tmp_path):
    """srun does not exist here; a stand-in shows what it would be given."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    out = run(ROOT / 'tools/slurm_train.sh', 'gpu', 'job', CONFIG, 'work', '--amp',
              env=dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='16',
                       SRUN_ARGS='--time=1 --qos=x')).stdout.splitlines()
    assert {'--partition=gpu', '--job-name=job', '--ntasks=16', '--ntasks-per-node=8',
            '--time=1', '--qos=x'} <= set(out)
    command = out[out.index('python'):]
    assert command == ['python', '-u', str(ROOT / 'tools/train.py'), str(CONFIG),
                       '--work-dir=work', '--launcher=slurm', '--amp']


class TestMissingFiles:
    """One clear message, and no checkpoint is written."""

    @pytest.fixture
    def refusal(self, tool_here, plain_configs, shapes, tmp_path):

        def run_it(*arguments, **env):
            result = tool_here(*arguments, cwd=tmp_path, env={'COCO_ROOT': shapes, **env})
            assert result.returncode == 1
            assert not list(tmp_path.rglob('*.pth'))
            return result.stderr

        return run_it

    def test_no_data(self, refusal):
        message = refusal('train.py', CONFIG, COCO_ROOT='/nowhere')
        assert ('train_dataloader: /nowhere/annotations/instances_train2017.json is not there'
                in message)
        assert "set COCO_ROOT (now '/nowhere')" in message

    def test_no_weights(self, refusal):
        message = refusal('train.py', CONFIG, *CLASSES, CE_RESNET50_CHECKPOINT='/nowhere/ce.pth')
        assert 'model.backbone.init_cfg: checkpoint not found: /nowhere/ce.pth' in message
        assert 'It is the value of CE_RESNET50_CHECKPOINT.' in message

    def test_a_classifier_needs_a_prefix(self, refusal, tmp_path_factory):
        """MMDetection's ResNet would load nothing from it."""
        path = tmp_path_factory.mktemp('weights') / 'classifier.pth'
        torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}), path)
        message = refusal('train.py', CONFIG.with_name('mask_rcnn_r50.py'), *CLASSES,
                          RESNET50_CHECKPOINT=str(path))
        assert f'0 arrive from {path}' in message
        assert "add prefix='backbone.' to init_cfg" in message

    @pytest.mark.parametrize(('arguments', 'message'), [
        (['test.py', CONFIG, '/nowhere/epoch_24.pth'], 'checkpoint not found: /nowhere/epoch_24.p'),
        (['train.py', 'nothing.py'], 'config not found: nothing.py')])
    def test_no_file(self, refusal, arguments, message):
        assert message in refusal(*arguments)


class TestDemoData:

    def test_same_arguments_same_files(self, shapes, tool_here, tmp_path):
        tool_here('dev/make_demo_data.py', tmp_path / 'again', '--train', 10, '--val', 6,
                  cwd=tmp_path)
        for path in shapes.rglob('*.*'):
            assert (tmp_path / 'again' / path.relative_to(shapes)).read_bytes() == \
                path.read_bytes()

    def test_annotations_are_cocos(self, tool_here, tmp_path):
        """pycocotools reads them; boxes and areas are those of the masks; all kinds occur."""
        tool_here('dev/make_demo_data.py', 'set', '--train', 120, '--val', 2, '--seed', 3,
                  cwd=tmp_path)
        coco = COCO(tmp_path / 'set/annotations/instances_train2017.json')
        assert len(coco.imgs) == 120
        annotated = [a for a in coco.anns.values() if not a['iscrowd']]
        for entry in coco.anns.values():
            mask = coco.annToMask(entry)
            rows, columns = mask.nonzero()
            left, top, width, height = entry['bbox']
            assert [columns.min(), rows.min()] == [left, top]
            assert [columns.max() + 1 - left, rows.max() + 1 - top] == [width, height]
            assert mask.sum() == entry['area']
        assert {a['category_id'] for a in annotated} == {1, 2, 3, 4, 5}
        assert any(a['iscrowd'] for a in coco.anns.values()), 'no crowd region'
        assert any(not coco.getAnnIds([i]) for i in coco.imgs), 'no empty image'
        assert any(a['area'] < 32**2 for a in annotated), 'no small object'
        assert any(len(a['segmentation']) > 1 or a['area'] < 0.7 * a['bbox'][2] * a['bbox'][3]
                   for a in annotated), 'no occlusion'

    def test_other_folders_are_not_overwritten(self, tool_here, tmp_path):
        (tmp_path / 'mine.txt').write_text('precious')
        result = tool_here('dev/make_demo_data.py', tmp_path, cwd=tmp_path)
        assert result.returncode == 1
        assert 'holds something else' in result.stderr
        assert (tmp_path / 'mine.txt').read_text() == 'precious'


def test_demo_end_to_end(tmp_path):
    """The demo on a handful of images: same steps, same files, no accuracy to speak of."""
    result = tool('demo.py', '--train-images', 8, '--val-images', 12, '--epochs', 1, cwd=tmp_path)
    work_dir = tmp_path / 'work_dirs/demo'
    assert (work_dir / 'epoch_1.pth').stat().st_size > 1e6
    for path in (work_dir / 'curves.png', *(work_dir / 'pictures').iterdir()):
        assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert len(list((work_dir / 'pictures').iterdir())) >= 12
    assert re.search(r'mask\s*│(\s*-?\d+\.\d\s*│){6}', result.stdout)
    assert f'{work_dir}/curves.png' in result.stdout


def test_browse_dataset_draws_the_training_images(shapes, tool_here, tmp_path):
    tool_here('browse_dataset.py', DEMO_CONFIG, '--not-show', '--output-dir', 'pictures',
              cwd=tmp_path, env=dict(COCO_ROOT=shapes))
    data = json.loads((shapes / 'annotations/instances_train2017.json').read_text())
    annotated = {a['image_id'] for a in data['annotations'] if not a['iscrowd']}
    assert len(list((tmp_path / 'pictures').iterdir())) == len(annotated)


def test_get_flops_needs_nothing_but_configs(tool_here, tmp_path):
    """Neither data nor weights; CE's operators count as computed, not as merged."""
    out = tool_here('get_flops.py', DEMO_CONFIG, ROOT / 'configs/imagenet/ce_resnet18.py', '--size',
                    64, 64, cwd=tmp_path).stdout
    detector, classifier = re.findall(r'│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+) +│', out)
    assert classifier[0] == '12.04'
    assert 0 < float(classifier[2]) < float(classifier[1])
    assert 0 < float(detector[2]) <= float(detector[1])


def test_benchmark_of_models(tool_here, tmp_path):
    copy = tmp_path / 'copy.py'  # another name for the same model
    copy.write_text(f'_base_ = "{DEMO_CONFIG}"')
    tool_here('benchmark.py', 'models', DEMO_CONFIG, copy, '--size', 64, 96, '--images', 1,
              '--repeats', 1, '--json', 'out.json', cwd=tmp_path)
    result = json.loads((tmp_path / 'out.json').read_text())
    first, second = (result['time'][name] for name in (DEMO_CONFIG.stem, 'copy'))
    assert first == [1.0]
    assert second[0] > 0
    assert len(set(result['kept_bytes'].values())) == 1
