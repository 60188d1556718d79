"""The command cenet-mmdet as users type it, in environments that work and in broken ones."""
import io
import os
import pickle
import re
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner.checkpoint import save_checkpoint
from torch import nn

from cenet_mmdet import CE, CEBN, CEResNet, insert_ce
from cenet_mmdet.checkpoint.convert import CheckpointError, to_released
from cenet_mmdet.checkpoint.load import _Pickle, load_tensors
from cenet_mmdet.cli import environment, main, pairings
from cenet_mmdet.utils.resources import configs_dir

SITE = Path(next(path for path in site.getsitepackages() if (Path(path) / 'torch').is_dir()))
maintained_line = pytest.mark.skipif(not any(SITE.glob('onedl_mmcv-*')),
                                     reason='breaks an environment of the maintained line')


def cli(*arguments, python=sys.executable, **options):
    return run(python, '-W', 'ignore', '-m', 'cenet_mmdet', *arguments, **options)


@pytest.fixture(scope='module')
def without_torch(tmp_path_factory):
    """The interpreter of an environment in which torch alone is missing."""
    venv = venv_of_links(tmp_path_factory.mktemp('without_torch'), without=('torch', 'torch-*'))
    return venv / 'bin/python'


@pytest.fixture(scope='module')
def torch_alone(tmp_path_factory):
    """The interpreter of an environment without any of OpenMMLab's libraries."""
    venv = venv_of_links(tmp_path_factory.mktemp('torch_alone'), without=('mm*', 'onedl*'))
    return venv / 'bin/python'


@pytest.fixture(scope='module')
def backbone():
    """CE-ResNet-18 whose statistics are set; lambda is 0.75 in one layer."""
    torch.manual_seed(0)
    network = CEResNet(18)
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(2, 3, 64, 64))
        network.layer1[0].ce.lambda_logit.fill_(np.log(3))
    return network


@pytest.fixture(scope='module')
def checkpoint(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'ce.pth'
    torch.save(backbone.state_dict(), path)
    return path


class TestDoctor:

    @maintained_line
    def test_a_good_environment(self, shapes, checkpoint, tmp_path):
        """From a foreign folder, with data and weights where the environment variables say."""
        places = {'COCO_ROOT': str(shapes), 'CE_RESNET50_CHECKPOINT': str(checkpoint)}
        result = cli('doctor', cwd=tmp_path, env=places)
        out = result.stdout
        assert re.search(r'mmcv +onedl-mmcv 2\.3\.6 +ok', out)
        assert re.search(r'torch +torch 2\.13\.0\S* +ok, ', out)
        assert "mmcv's operators run on: cpu" in out
        for library in ('mmengine', 'mmdet', 'mmpretrain'):
            assert f'{library} finds the layers and backbones\n' in out
        assert 'versions: as tested in the maintained line' in out
        assert 'Problems' not in out and 'Warnings' not in out
        assert out.endswith('Verdict: mask_rcnn_ce_r50.py can be trained here.\n')

    @maintained_line
    def test_without_mmdet(self, tmp_path):
        result = doctor_in(venv_of_links(tmp_path, without=MMDET))
        assert result.returncode == 1
        assert 'mmdet is not installed' in result.stdout
        assert '-m pip install --no-build-isolation onedl-mmdetection==3.5.1\n' in result.stdout
        assert 'except CEResNet, CEMobileNetV2' in result.stdout
        assert not re.search(r'pip install.* torch', result.stdout)

    @maintained_line
    def test_mmcv_without_operators(self, tmp_path):
        """As a build in pip's isolated environment leaves it."""
        environment = venv_of_links(tmp_path, without='mmcv')
        folder = packages_of(environment) / 'mmcv'
        folder.mkdir()
        for path in (SITE / 'mmcv').iterdir():
            if not path.name.startswith('_ext'):
                (folder / path.name).symlink_to(path)
        result = doctor_in(environment)
        assert result.returncode == 1
        assert "mmcv's operators do not run: ModuleNotFoundError: No module named 'mmcv._ext'" in \
            result.stdout
        # one cause and one fix, which compiles for the torch that is there and leaves it alone
        assert result.stdout.count('onedl-mmcv==2.3.6') == 1
        assert re.search(r'MMCV_WITH_OPS=1 .*--no-build-isolation.*--no-deps.*onedl-mmcv==2\.3\.6',
                         result.stdout)
        assert not re.search(r'pip install.* torch', result.stdout)

    @maintained_line
    def test_mmdet_that_refuses_this_mmcv(self, tmp_path):
        """mmdet of the legacy line, whose import fails, next to mmcv of the maintained one."""
        environment = venv_of_links(tmp_path, without=MMDET)
        packages = packages_of(environment)
        (packages / 'mmdet').mkdir()
        (packages / 'mmdet/__init__.py').write_text(
            "import mmcv\nmmcv_minimum_version = '2.0.0rc4'\nmmcv_maximum_version = '2.2.0'\n"
            "assert mmcv.__version__ < mmcv_maximum_version, 'mmcv is incompatible'\n")
        metadata = packages / 'mmdet-3.3.0.dist-info/METADATA'
        metadata.parent.mkdir()
        metadata.write_text('Metadata-Version: 2.1\nName: mmdet\nVersion: 3.3.0\n')
        result = doctor_in(environment)
        assert result.returncode == 1
        assert 'mmdet 3.3.0 takes mmcv >=2.0.0rc4, <2.2.0, and 2.3.6 is installed' in result.stdout
        uninstall, install = commands(result.stdout)[:2]
        assert uninstall.endswith('-m pip uninstall -y mmdet')
        assert install.endswith('-m pip install --no-build-isolation onedl-mmdetection==3.5.1')
        assert 'untested, nearest to the maintained line' in result.stdout

    @maintained_line
    def test_without_torch(self, without_torch, tmp_path):
        result = cli('doctor', python=without_torch, cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert commands(result.stdout) == [
            f"{without_torch} -m pip install torch==2.13.0 'numpy>=2.2,<2.3'"]

    def test_missing_data_is_the_jobs_problem(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('COCO_ROOT', 'nowhere')
        monkeypatch.delenv('CE_RESNET50_CHECKPOINT', raising=False)
        assert main(['doctor']) == 1
        out = capsys.readouterr().out
        assert 'Problems of the environment' not in out
        job = out.split('Data and weights of mask_rcnn_ce_r50.py:')[1]
        assert 'annotations not found: nowhere/annotations/instances_train2017.json' in job
        assert commands(job) == ['export COCO_ROOT=/path/to/nowhere',
                                 'export CE_RESNET50_CHECKPOINT=/path/to/ce_resnet50.pth']
        assert 'the environment is fine; mask_rcnn_ce_r50.py lacks data or weights' in job

    def test_another_config(self, shapes, tmp_path, monkeypatch, capsys):
        """One's own, which needs torchvision's weights where there is no torchvision."""
        monkeypatch.setenv('COCO_ROOT', str(shapes))
        monkeypatch.delenv('RESNET50_CHECKPOINT', raising=False)
        config = tmp_path / 'mine.py'
        config.write_text(f"_base_ = '{configs_dir()}/mask_rcnn_r50.py'\n")
        assert main(['doctor', '--config', str(config)]) == 1
        out = capsys.readouterr().out
        assert 'torchvision://resnet50 needs torchvision' in out
        assert commands(out) == ['export RESNET50_CHECKPOINT=/path/to/resnet50.pth']

    def test_a_library_that_is_shadowed(self, without_torch, tmp_path):
        (tmp_path / 'mmdet').mkdir()
        (tmp_path / 'mmdet/__init__.py').write_text('raise RuntimeError("not this one")')
        result = cli('doctor', python=without_torch, cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert f'mmdet is imported from {tmp_path}/mmdet, not from where' in result.stdout
        assert 'mmdet cannot be imported: RuntimeError: not this one\n        cd ..\n' in \
            result.stdout

    def test_an_unknown_config_names_near_ones(self):
        with pytest.raises(SystemExit, match=r'not found: mask_rcnn_ce_r5.*mask_rcnn_ce_r50\.py'):
            main(['doctor', '--config', 'mask_rcnn_ce_r5'])

    def test_help_has_an_example(self, capsys):
        with pytest.raises(SystemExit, match='0'):
            main(['doctor', '--help'])
        assert 'cenet-mmdet doctor --config mask_rcnn_syncce_r50.py' in capsys.readouterr().out


class TestFixes:
    """Which commands are chosen, from what is said to be installed."""

    @staticmethod
    def library(name, distribution, version, error=''):
        class Installed:
            metadata = {'Name': distribution}

            def read_text(self, name):
                return None
        found = Installed()
        found.version = version
        return environment.Library(name, (found, ), None, error)

    def installed(self, **versions):
        names = {'mmdet': 'mmdet', 'mmcv': 'mmcv', 'mmengine': 'mmengine'}
        if versions.pop('maintained', False):
            names = {name: pin.split('==')[0]
                     for name, pin in pairings.MAINTAINED.requirements.items()}
        return {name: self.library(name, names.get(name, name), version)
                for name, version in versions.items()}

    @pytest.mark.parametrize('versions, line', [
        (dict(torch='2.1.2+cu121', mmcv='2.1.0'), pairings.LEGACY),
        (dict(torch='1.13.1'), pairings.LEGACY),
        (dict(torch='2.3.0', mmcv='2.2.0', mmdet='3.3.0'), pairings.LEGACY),
        (dict(torch='2.3.0', mmcv='2.3.6', maintained=True), pairings.MAINTAINED),
        (dict(torch='2.13.0', mmcv='2.1.0', mmdet='3.3.0'), pairings.MAINTAINED),
        (dict(torch='2.9.0'), pairings.MAINTAINED)])
    def test_the_line_fits_the_torch_that_is_there(self, versions, line):
        assert pairings.line_of(self.installed(**versions)) is line

    def test_legacy_versions_are_a_known_pairing(self):
        good = dict(torch='2.1.2+cu121', mmengine='0.10.7', mmcv='2.1.0', mmdet='3.3.0',
                    numpy='1.26.4')
        assert pairings.departures(pairings.LEGACY, self.installed(**good)) == []
        for change in (dict(torch='2.2.0'), dict(mmcv='2.2.0'), dict(numpy='2.2.6')):
            installed = self.installed(**{**good, **change})
            difference, = pairings.departures(pairings.LEGACY, installed)
            assert difference.startswith(' '.join(*change.items()))

    def test_mmcv_too_new_for_legacy_mmdet(self):
        installed = self.installed(torch='2.3.0', mmengine='0.10.7', mmcv='2.2.0', mmdet='3.3.0')
        fix = pairings.move(['mmcv', 'mmdet'], pairings.line_of(installed), installed)
        assert fix[-1].endswith('--no-binary mmcv mmcv==2.1.0')
        assert 'mmdet' not in ' '.join(fix)

    @pytest.mark.parametrize('name, error, command', [
        ('cv2', 'ImportError: libGL.so.1: cannot open shared object file',
         'install --no-deps opencv-python-headless==4.11.0.86'),
        ('mmengine', "ModuleNotFoundError: No module named 'yaml'", 'install pyyaml'),
        ('pycocotools', 'ValueError: numpy.dtype size changed', "install 'numpy<2'"),
        ('mmdet', 'ImportError: mmcv/_ext.so: undefined symbol: x', 'mmcv==2.1.0'),
        ('mmcv', 'SyntaxError: invalid syntax', 'MMCV_WITH_OPS=1'),
        ('mmdet', "ModuleNotFoundError: No module named 'pkg_resources'", "'setuptools<81'")])
    def test_an_import_that_fails(self, name, error, command):
        installed = self.installed(torch='2.1.2', mmengine='0.10.7', mmcv='2.1.0', mmdet='3.3.0')
        installed['cv2'] = self.library('cv2', 'opencv-python', '4.11.0.86')
        broken = self.library(name, installed[name].providers[0] if name in installed else name,
                              '1', error)
        fix = ' && '.join(pairings.fix_import(broken, pairings.LEGACY, installed))
        assert command in fix
        assert not re.search(r'install.* torch', fix)

    def test_limits_are_read_without_importing(self, tmp_path):
        """In the spelling of each OpenMMLab library."""
        source = tmp_path / '__init__.py'
        library = self.library('mmseg', 'mmsegmentation', '1.2.2')._replace(folder=tmp_path)
        source.write_text("raise RuntimeError\nMMCV_MIN = '2.0.0rc4'\nMMCV_MAX = '2.2.0'\n")
        assert environment.version_limits(library) == {'mmcv': ('2.0.0rc4', '2.2.0')}
        source.write_text("mmcv_minimum_version = '2.0.0'\nmmengine_maximum_version = '1.0.0'\n")
        assert environment.version_limits(library) == {'mmcv': ('2.0.0', ''),
                                                       'mmengine': ('0', '1.0.0')}


class TestConfigs:

    def test_list(self, without_torch, tmp_path):
        out = cli('configs', 'list', python=without_torch, cwd=tmp_path).stdout
        listed = set(re.findall(r'^  (\S+\.py)  +\S', out, re.MULTILINE))
        assert listed == {path.relative_to(ROOT / 'configs').as_posix()
                          for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in str(path)}
        assert re.search(r'mask_rcnn_r50\.py +Table 5, row "ResNet50": the baseline\n', out)
        # a period inside a name ends no sentence, examples after the comment are left out
        assert re.search(r'mask_rcnn_ce_r50_1x\.py +mask_rcnn_ce_r50\.py for .* 24\n', out)
        assert 'bd_ratio' not in out

    @pytest.mark.parametrize('name', ['mask_rcnn_ce_r50_1x', 'imagenet/ce_resnet50_bd.py'])
    def test_a_copy_is_the_same_config(self, name, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(['configs', 'copy', name, '--to', 'a/b']) == 0
        name = f'{name.replace(".py", "")}.py'
        out = capsys.readouterr().out
        assert f'wrote a/b/{name}\n' in out
        assert f'cenet-mmdet doctor --config a/b/{name}\n' in out
        assert {f'wrote {path.relative_to(tmp_path)}' for path in tmp_path.rglob('*.py')} == \
            {line for line in out.splitlines() if line.startswith('wrote')}
        assert Config.fromfile(f'a/b/{name}').to_dict() == \
            Config.fromfile(configs_dir() / name).to_dict()

    def test_every_config_can_be_copied(self, tmp_path):
        from cenet_mmdet.cli.configs import shipped_configs
        for name in shipped_configs():
            assert main(['configs', 'copy', name, '--to', str(tmp_path)]) == 0
        copies = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob('*.py')}
        assert copies == {path.relative_to(configs_dir()): path.read_bytes()
                          for path in configs_dir().rglob('*.py')}

    def test_another_file_is_not_replaced(self, tmp_path):
        mine = tmp_path / '_base_/runtime.py'
        mine.parent.mkdir()
        mine.write_text('# mine\n')
        with pytest.raises(SystemExit, match=r'_base_/runtime\.py is there .*nothing was written'):
            main(['configs', 'copy', 'mask_rcnn_r50', '--to', str(tmp_path)])
        assert mine.read_text() == '# mine\n'
        assert list(tmp_path.rglob('*.py')) == [mine]

    def test_nothing_is_left_where_writing_fails(self, tmp_path):
        (tmp_path / '_base_').write_text('a file where a folder should be')
        with pytest.raises(SystemExit, match=r'cannot write .*nothing was written'):
            main(['configs', 'copy', 'mask_rcnn_r50', '--to', str(tmp_path)])
        assert not list(tmp_path.rglob('*.py'))

    @pytest.mark.parametrize('name, near', [('ce_resnet50', 'imagenet/ce_resnet50.py'),
                                            ('mask_rcnn_syncce', 'mask_rcnn_syncce_r50.py')])
    def test_an_unknown_name(self, name, near, without_torch, tmp_path):
        result = cli('configs', 'copy', name, python=without_torch, cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert f'config not found: {name}. Did you mean ' in result.stderr
        assert near in result.stderr and 'configs list' in result.stderr
        assert not list(tmp_path.iterdir())


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path), )


class TestSafeLoad:

    @pytest.fixture(params=[True, False], ids=['zip', 'legacy'])
    def save(self, request, tmp_path):
        def save(checkpoint):
            path = tmp_path / 'checkpoint.pth'
            torch.save(checkpoint, path, _use_new_zipfile_serialization=request.param)
            return path
        return save

    def test_a_payload_does_not_run(self, save, tmp_path):
        weights = {'a': torch.arange(3.), 'b': nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
        path = save(dict(meta=Payload(tmp_path / 'payload'), state_dict=weights))
        tensors = load_tensors(path)
        assert not (tmp_path / 'payload').exists()
        assert list(tensors) == ['a', 'b']
        assert all(torch.equal(tensors[key], weights[key]) for key in weights)
        torch.load(path, weights_only=False)
        assert (tmp_path / 'payload').exists(), 'the payload is harmless anyhow'

    def test_state_is_set_on_nothing(self, save):
        """A pickle can ask for attributes of functions that rebuild tensors to be replaced."""
        rebuild = torch._utils._rebuild_tensor_v2
        pickled = (b'\x80\x02}X\x01\x00\x00\x00aNsctorch._utils\n_rebuild_tensor_v2\n'
                   b'N}X\x04\x00\x00\x00evilK\x01s\x86b0.')
        assert _Pickle.load(io.BytesIO(pickled)) == {'a': None}
        assert not hasattr(rebuild, 'evil')
        pickle.loads(pickled)
        assert rebuild.evil == 1, 'the pickle asks for nothing'
        del rebuild.evil

    def test_checkpoint_of_a_run(self, save, backbone):
        """What MMEngine keeps beside the weights, which weights_only refuses."""
        hub = MessageHub('test_cli')
        hub.update_scalar('train/loss', np.float32(0.5))
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
        path = save(dict(meta=dict(epoch=1, seed=np.int64(3)), state_dict=backbone.state_dict(),
                         message_hub=hub.state_dict(), optimizer=optimizer.state_dict()))
        assert isinstance(torch.load(path, weights_only=False)['message_hub']['log_scalars']
                          ['train/loss'], HistoryBuffer)
        tensors = load_tensors(path)
        expected = backbone.state_dict()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


class TestInfo:

    def test_without_torch(self, checkpoint, without_torch):
        result = cli('info', checkpoint, python=without_torch, check=False)
        assert result.returncode == 1
        assert re.fullmatch(r'info needs torch .*cenet-mmdet doctor.*\n', result.stderr)

    @staticmethod
    def info(path, capsys):
        assert main(['info', str(path)]) == 0
        out = capsys.readouterr().out
        rows = [re.split(r'  +', line) for line in out.splitlines() if '  ' in line]
        return out, {cells[0]: cells[1:] for cells in rows}

    def test_as_typed(self, checkpoint, torch_alone):
        out = cli('info', checkpoint.name, python=torch_alone, cwd=checkpoint.parent).stdout
        assert 'ce.pth: CE-ResNet; ' in out and 'CE layers: ' in out
        assert re.search(r'^layer1\.0\.ce +64 +16 +0\.7500 +BD \+ IR +set \(2\) +-$', out,
                         re.MULTILINE)

    def test_one_row_for_each_layer(self, backbone, checkpoint, capsys):
        _, rows = self.info(checkpoint, capsys)
        layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, CE)}
        assert rows.keys() - {'layer'} == layers.keys()
        for name, layer in layers.items():
            assert rows[name][:2] == [str(layer.in_channels), str(layer.group_size)]

    def test_the_authors_file(self, backbone, tmp_path, capsys):
        path = tmp_path / 'released.pth.tar'
        released = {f'module.{key}': value
                    for key, value in to_released(backbone.state_dict()).items()}
        torch.save(dict(state_dict=released), path)
        out, rows = self.info(path, capsys)
        assert "authors' CE-ResNet" in out
        assert rows['layer1.0.ce'] == ['64', '16', '0.7500', 'BD + IR', 'set (1)', '-']

    def test_other_places_and_branches(self, tmp_path, capsys):
        """insert_ce, CEBN, a Sequential, one branch alone and a fixed lambda, in one file."""
        model = nn.ModuleDict(dict(
            backbone=insert_ce(nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)), '1'),
            bn1=CEBN(48, ce_cfg=dict(bd_ratio=1.0)), neck=nn.Sequential(CE(24, bd_ratio=0.0)),
            ce=CE(32, bd_ratio=0.3)))
        path = tmp_path / 'epoch_1.pth'
        save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(path))
        out, rows = self.info(path, capsys)
        assert 'detector' in out and 'statistics of 4 layers were neither trained nor' in out
        assert rows['backbone.1.ce'] == ['32', '16', '0.5000', 'BD + IR', 'not set', '-']
        assert rows['bn1.ce'] == ['48', '16', '1 (fixed)', 'BD', 'not set', '-']
        assert rows['neck.0'] == ['24', '-', '0 (fixed)', 'IR', 'not set', '-']
        assert rows['ce'] == ['32', '16', 'fixed', 'BD + IR', 'not set', '-']

    def test_values_that_are_not_finite(self, backbone, tmp_path, capsys):
        state = {key: value.clone() for key, value in backbone.state_dict().items()}
        state['layer1.0.ce.running_whitening'][0, 0, :3] = float('nan')
        state['conv1.weight'][0, 0, 0, 0] = float('inf')
        torch.save(state, tmp_path / 'bad.pth')
        out, rows = self.info(tmp_path / 'bad.pth', capsys)
        assert rows['layer1.0.ce'][-1] == '3'
        assert rows['layer1.1.ce'][-1] == '-'
        assert re.search(r'conv1\.weight +1 of 9408', out)
        assert re.search(r'layer1\.0\.ce\.running_whitening +3 of 1024', out)

    def test_no_ce_layers_is_an_answer(self, tmp_path, capsys):
        torch.save(CEResNet(18, ce_blocks=((), (), (), ()), ce_stem=False).state_dict(),
                   tmp_path / 'plain.pth')
        out, _ = self.info(tmp_path / 'plain.pth', capsys)
        assert 'ResNet without CE' in out and 'holds no CE layers' in out

    @pytest.mark.parametrize('content, message', [
        (None, 'checkpoint not found: .*Give the path'),
        (b'no checkpoint at all', 'not a checkpoint: .*was not written by torch.save'),
        ('truncated', 'not a checkpoint: .* is truncated'),
        ({'epoch': 3}, 'no weights in .*holds no tensors'),
        ('program', 'not a checkpoint: .* TorchScript')])
    def test_no_checkpoint(self, content, message, checkpoint, tmp_path):
        path = tmp_path / 'x.pth'
        if content == 'truncated':
            path.write_bytes(checkpoint.read_bytes()[:100000])
        elif content == 'program':
            with zipfile.ZipFile(path, 'w') as archive:  # what tells torch.load to run it
                archive.writestr('x/constants.pkl', b'\x80\x02).')
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            torch.save(content, path)
        with pytest.raises(SystemExit) as error:
            main(['info', str(path)])
        assert re.search(message, str(error.value))
        assert '\n' not in str(error.value) and str(path) in str(error.value)
        with pytest.raises(CheckpointError):
            load_tensors(path)


# Entries of site-packages.
MMDET = ('mmdet', 'onedl_mmdetection*')


def venv_of_links(folder, without):
    """An environment of its own, with all of this one's packages except some; its folder."""
    venv = folder / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(venv)], check=True)
    # mmpretrain takes seconds to import and has no part in these tests
    left_out = ('mmpretrain', 'onedl_mmpretrain*', *([without] if isinstance(without, str)
                                                     else without))
    for path in SITE.iterdir():
        if not any(path.match(pattern) for pattern in left_out):
            (packages_of(venv) / path.name).symlink_to(path)
    return venv


def packages_of(venv):
    return next(venv.glob('lib/python3*/site-packages'))


def doctor_in(venv):
    return run(venv / 'bin/python', '-W', 'ignore', '-m', 'cenet_mmdet', 'doctor', cwd=venv,
               check=False)


def commands(report):
    """The lines of a report that are to be typed."""
    return [line.strip() for line in report.splitlines() if line.startswith('        ')]
