"""The command cenet-mmdet as users type it, in environments that work and in broken ones."""
import json
import os
import re
import shutil
import site
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LEGACY, ROOT, run
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import save_checkpoint
from torch import nn

import cenet_mmdet.models.mmpretrain  # noqa: F401  else doctor imports it in a new process
from cenet_mmdet import CE, CEBN, CEResNet, IterNorm, insert_ce
from cenet_mmdet.checkpoint.convert import to_released
from cenet_mmdet.checkpoint.load import UnsafeCheckpointError
from cenet_mmdet.cli import main
from cenet_mmdet.cli.fixes import differing, fix, nearest_stack
from cenet_mmdet.utils.resources import configs_dir
from cenet_mmdet.utils.stacks import STACKS

SITE = Path(next(path for path in site.getsitepackages() if (Path(path) / 'torch').is_dir()))


def cli(python, *arguments, **options):
    return run(python, '-W', 'ignore', '-m', 'cenet_mmdet', *arguments, **options)


def environment(folder, *without):
    """Python and site-packages of an environment without mmpretrain, which is slow, and others."""
    venv.create(folder / 'venv', symlinks=True)
    packages = next(folder.glob('venv/lib/python3*/site-packages'))
    for path in SITE.iterdir():
        if not any(path.match(left_out) for left_out in ('*mmpretrain*', *without)):
            (packages / path.name).symlink_to(path)
    return folder / 'venv/bin/python', packages


def plant(packages, name, version, source=None):
    """Install a library that consists of one file, or its metadata alone."""
    if source:
        (packages / f'{name}.py').write_text(source)
    (packages / f'{name}-{version}.dist-info').mkdir()
    (packages / f'{name}-{version}.dist-info/METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def commands(report):
    return [line.strip() for line in report.splitlines() if line.startswith('      ')]


@pytest.fixture(scope='module')
def without_torch(tmp_path_factory):
    return environment(tmp_path_factory.mktemp('without_torch'), 'torch', 'torch-*')[0]


@pytest.fixture(scope='module')
def backbone():
    """CE-ResNet-18 whose statistics are set; lambda is 0.75 in one layer."""
    network = CEResNet(18)
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
        network.layer1[0].ce.lambda_logit.fill_(np.log(3))
    return network


@pytest.fixture(scope='module')
def coco(shapes, tmp_path_factory):
    """The generated set with COCO's categories, as the shipped configs expect them."""
    folder = Path(shutil.copytree(shapes, tmp_path_factory.mktemp('data') / 'coco'))
    for path in folder.glob('annotations/*.json'):
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=index, name=name) for index, name
                                 in enumerate(CocoDataset.METAINFO['classes'], 1)]
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope='module')
def checkpoint(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'ce.pth'
    torch.save(backbone.state_dict(), path)
    return path


@pytest.mark.parametrize('command', ['doctor', 'configs list', 'configs copy', 'info'])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match='0'):
        main([*command.split(), '--help'])
    assert re.search(rf'\n    .*cenet-mmdet {command}', capsys.readouterr().out)


@pytest.mark.skipif(LEGACY, reason='breaks an environment of the maintained stack')
class TestDoctor:

    def test_training_can_start(self, coco, checkpoint, tmp_path):
        """From a foreign folder; torchvision is broken, as beside a CPU torch, and not needed."""
        python, packages = environment(tmp_path)
        error = 'operator torchvision::nms does not exist'
        plant(packages, 'torchvision', '0.20.0', f'raise RuntimeError("{error}")')
        places = {'COCO_ROOT': str(coco), 'CE_RESNET50_CHECKPOINT': str(checkpoint)}
        out = cli(python, 'doctor', cwd=tmp_path, env=places).stdout
        assert re.findall(r'^(.*\S) +fails', out, re.MULTILINE) == ['torchvision']
        assert f'\n- torchvision (optional): RuntimeError: {error}\n' in out
        assert commands(out) == [f'{python} -m pip uninstall -y torchvision']
        assert re.search(r'^mmcv +ok +onedl-mmcv 2\.3\.6$', out, re.MULTILINE)
        assert 'versions: as in the tested maintained stack' in out
        assert out.endswith('Verdict: mask_rcnn_ce_r50.py can be trained here.\n')

    def test_without_torch(self, without_torch, tmp_path):
        result = cli(without_torch, 'doctor', cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert commands(result.stdout) == [
            f"{without_torch} -m pip install torch==2.13.0 'numpy>=2.2,<2.3'"]

    def test_mmcv_without_operators(self, tmp_path):
        python, packages = environment(tmp_path, 'mmcv')
        shutil.copytree(SITE / 'mmcv', packages / 'mmcv', ignore=shutil.ignore_patterns('_ext*'))
        result = cli(python, 'doctor', cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert '- mmdet, mmcv operators, registered layers, config and files: ' in result.stdout
        assert "No module named 'mmcv._ext'" in result.stdout
        assert re.search(r'MMCV_WITH_OPS=1 .*--no-build-isolation.*--no-deps.*onedl-mmcv==2\.3\.6$',
                         commands(result.stdout)[3])
        assert not re.search(r'install.* torch', result.stdout)

    def test_mmdet_and_mmcv_of_two_stacks(self, tmp_path):
        """mmdet of the legacy stack refuses mmcv of the maintained one, beside another mmcv."""
        python, packages = environment(tmp_path, 'mmdet', 'onedl_mmdetection*')
        plant(packages, 'mmdet', '3.3.0', 'import mmcv\nassert mmcv.__version__ < "2.2.0", "no"\n')
        plant(packages, 'mmcv', '2.1.0')
        result = cli(python, 'doctor', cwd=tmp_path, check=False)
        assert result.returncode == 1
        mmcv, mmdet = result.stdout.split('\n- ')[1:]
        assert 'overwrite each other' in mmcv
        assert set(commands(mmcv)[0].split()[-2:]) == {'mmcv', 'onedl-mmcv'}
        assert 'AssertionError: no' in mmdet
        uninstall, install = commands(mmdet)
        assert uninstall.endswith('uninstall -y mmdet') and 'onedl-mmdetection==3.5.1' in install
        assert 'differ from the tested maintained stack: mmcv 2.1.0, mmdet 3.3.0\n' in result.stdout

    @pytest.mark.parametrize('content, problem', [
        ("_base_ = 'nowhere.py'", r'- config and files: \w+: .*nowhere\.py.*'),
        (f"_base_ = '{configs_dir()}/mask_rcnn_r50.py'", '.*needs torchvision, which is not.*'),
        (f"_base_ = '{configs_dir()}/mask_rcnn_ce_r50.py'\n"
         "train_dataloader = dict(dataset=dict(data_root='nowhere'))",
         '.*nowhere/annotations/instances_train2017.json is not there.*')])
    def test_a_config_that_lacks_something(self, content, problem, coco, checkpoint, tmp_path,
                                           monkeypatch, capsys):
        monkeypatch.setenv('COCO_ROOT', str(coco))
        monkeypatch.setenv('CE_RESNET50_CHECKPOINT', str(checkpoint))
        monkeypatch.delenv('RESNET50_CHECKPOINT', raising=False)
        (tmp_path / 'mine.py').write_text(content)
        assert main(['doctor', '--config', str(tmp_path / 'mine.py')]) == 1
        out = capsys.readouterr().out
        assert re.search(f'^{problem}$', out, re.MULTILINE)
        assert out.count('fails') == 1 and 'mine.py cannot be trained here.' in out


class TestFixes:

    INSTALLED = {
        'torch': {'torch': '2.1.2+cu121'}, 'numpy': {'numpy': '1.26.4'},
        'cv2': {'opencv-python': '4.11.0.86'}, 'mmengine': {'mmengine': '0.10.7'},
        'mmcv': {'mmcv': '2.1.0'}, 'mmdet': {'mmdet': '3.3.0'}}

    def test_the_stack_fits_the_torch_that_is_there(self):
        versions = ['1.13.1', '2.1.0+cu118', '2.2.0', '2.13.0']
        assert [nearest_stack({'torch': {'torch': version}}) for version in versions] == \
            ['legacy', 'legacy', 'maintained', 'maintained']

    @pytest.mark.parametrize('library', ['torch', 'mmcv', 'numpy', 'mmdet'])
    def test_the_legacy_stack_is_a_known_pairing(self, library):
        legacy, changed = STACKS['legacy'], {**self.INSTALLED, library: {library: '3.3.0rc1'}}
        assert not any(differing(name, legacy, self.INSTALLED) for name in self.INSTALLED)
        assert differing(library, legacy, changed) == [f'{library} 3.3.0rc1']

    @pytest.mark.parametrize('check, error, expected', [
        ('config and files', "ModuleNotFoundError: No module named 'pkg_resources'",
         ["'setuptools<81' 'numpy<2'"]),
        ('mmcv operators', 'RuntimeError: Numpy is not available',
         ["'numpy<2' opencv-python-headless==4.11.0.86 opencv-python==4.11.0.86"]),
        ('mmdet', 'ImportError: /x/mmcv/_ext.so: undefined symbol: y',
         ['-y mmcv', 'psutil', 'nvcc.', '--no-binary mmcv mmcv==2.1.0']),
        ('mmpretrain', "ModuleNotFoundError: No module named 'torch.new'", []),
        ('torch', 'OSError: libcudart.so.12: cannot open shared object file', [])])
    def test_commands(self, check, error, expected):
        found = fix(check, error, STACKS['legacy'], self.INSTALLED)
        assert len(found) == len(expected) and all(map(str.endswith, found, expected))


class TestConfigs:

    def test_list(self, without_torch, tmp_path):
        out = cli(without_torch, 'configs', 'list', cwd=tmp_path).stdout
        listed = dict(re.split(' +', line, maxsplit=1) for line in out.splitlines())
        assert listed.keys() == {path.relative_to(ROOT / 'configs').as_posix()
                                 for path in (ROOT / 'configs').rglob('*.py')
                                 if '_base_' not in str(path)}
        assert listed['mask_rcnn_ce_r50_1x.py'] == 'mask_rcnn_ce_r50.py for 12 epochs instead of 24'

    @pytest.mark.parametrize('name, count', [('mask_rcnn_ce_r50_1x', 5),
                                             ('imagenet/ce_resnet50_bd.py', 4)])
    def test_a_copy_has_what_it_inherits_from_and_no_more(self, name, count, tmp_path):
        assert main(['configs', 'copy', name, '--to', str(tmp_path / 'a/b')]) == 0
        copy, original = (Config.fromfile(folder / f'{name.replace(".py", "")}.py').to_dict()
                          for folder in (tmp_path / 'a/b', configs_dir()))
        assert copy == original
        assert len(list(tmp_path.rglob('*.py'))) == count

    @pytest.mark.parametrize('name', ['_base_/runtime.py', '_base_'])
    def test_all_or_nothing(self, name, tmp_path):
        mine = tmp_path / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text('# mine')
        with pytest.raises(SystemExit, match=f'{mine.name}.*nothing was written'):
            main(['configs', 'copy', 'mask_rcnn_r50', '--to', str(tmp_path)])
        assert mine.read_text() == '# mine'
        assert [path for path in tmp_path.rglob('*') if path.is_file()] == [mine]

    @pytest.mark.parametrize('command', ['configs copy', 'doctor --config'])
    def test_an_unknown_name(self, command):
        with pytest.raises(SystemExit, match=r"'ce_resnet50\.py'.*imagenet/ce_resnet50\.py"):
            main([*command.split(), 'ce_resnet50'])


class Payload(str):
    """Creates the folder of its name when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self), )


class TestInfo:

    def info(self, path, capsys):
        assert main(['info', str(path)]) == 0
        out = capsys.readouterr().out
        rows = [re.split(r'  +', line) for line in out.splitlines() if '  ' in line]
        return out, {cells[0]: cells[1:] for cells in rows[1:]}

    def test_without_torch(self, checkpoint, without_torch):
        result = cli(without_torch, 'info', checkpoint, check=False)
        assert result.returncode == 1
        assert re.fullmatch(r'info needs torch .*cenet-mmdet doctor.*\n', result.stderr)

    def test_with_torch_alone(self, backbone, checkpoint, tmp_path):
        python, _ = environment(tmp_path, 'mm*', 'onedl*')
        out = cli(python, 'info', checkpoint.name, cwd=checkpoint.parent).stdout
        count = sum(isinstance(layer, CE) for layer in backbone.modules())
        assert f'ce.pth: {len(backbone.state_dict())} entries, {count} CE layers\n' in out
        assert len(re.findall(r' BD \+ IR +set$', out, re.MULTILINE)) == count
        assert re.search(r'^layer1\.0\.ce +64 +16 +0\.7500 +BD ', out, re.MULTILINE)

    def test_other_places_and_branches(self, tmp_path, capsys):
        model = nn.ModuleDict(dict(
            backbone=insert_ce(nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)), '1'),
            bn1=CEBN(48, ce_cfg=dict(bd_ratio=1.0)), neck=nn.Sequential(CE(24, bd_ratio=0.0)),
            ce=CE(32, bd_ratio=0.3), other=IterNorm(32)))
        save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(tmp_path / 'a.pth'))
        _, rows = self.info(tmp_path / 'a.pth', capsys)
        assert rows == {'backbone.1.ce': ['32', '16', '0.5000', 'BD + IR', 'not set'],
                        'bn1.ce': ['48', '16', '1 (fixed)', 'BD', 'not set'],
                        'neck.0': ['24', '-', '0 (fixed)', 'IR', 'not set'],
                        'ce': ['32', '16', 'fixed', 'BD + IR', 'not set']}

    @pytest.mark.parametrize('origin', ['authors', 'run'])
    def test_other_origins(self, origin, backbone, tmp_path, capsys):
        weights, path = backbone.state_dict(), tmp_path / 'x.pth'
        if origin == 'authors':
            weights = {f'module.{key}': value for key, value in to_released(weights).items()}
            torch.save(dict(state_dict=weights), path)
        elif LEGACY:
            pytest.skip('this torch cannot read it without running code')
        else:
            hub = MessageHub('test_cli')
            hub.update_scalar('train/loss', np.float32(0.5))
            torch.save(dict(state_dict=weights, message_hub=hub.state_dict(),
                            meta=dict(seed=np.int64(3))), path)
        assert self.info(path, capsys)[1]['layer1.0.ce'] == ['64', '16', '0.7500', 'BD + IR', 'set']

    def test_values_that_are_not_finite(self, tmp_path, capsys):
        state = dict(a=torch.tensor([1, float('nan'), float('inf')]), b=torch.tensor([1, 2]))
        torch.save(state, tmp_path / 'bad.pth')
        out, _ = self.info(tmp_path / 'bad.pth', capsys)
        assert re.findall('inf or NaN: .*', out) == ['inf or NaN: a, 2 of 3 values']
        assert '2 entries, 0 CE layers' in out

    @pytest.mark.parametrize('is_zip', [True, False])
    def test_a_malicious_file_is_refused(self, is_zip, tmp_path):
        path = tmp_path / 'x.pth'
        torch.save(dict(meta=Payload(tmp_path / 'payload'), state_dict={'a': torch.zeros(1)}), path,
                   _use_new_zipfile_serialization=is_zip)
        with pytest.raises(SystemExit, match=r'x\.pth holds ') as exit_error:
            main(['info', str(path)])
        assert isinstance(exit_error.value.__context__, UnsafeCheckpointError)
        assert not (tmp_path / 'payload').exists()
        torch.load(path, weights_only=False)
        assert (tmp_path / 'payload').exists(), 'the payload is harmless'

    @pytest.mark.parametrize('end, message', [
        (0, 'checkpoint not found'), (10, 'not a checkpoint'), (100000, 'not a checkpoint')])
    def test_no_checkpoint(self, end, message, checkpoint, tmp_path):
        path = tmp_path / 'x.pth'
        if end:
            path.write_bytes(checkpoint.read_bytes()[:end])
        with pytest.raises(SystemExit, match=rf'^{message}: {path}.*\.$'):
            main(['info', str(path)])
