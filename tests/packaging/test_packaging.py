"""Wheel and sdist, in an environment of their own; what the package needs; its metafiles."""
import json
import shutil
import stat
import sys
import sysconfig
import tarfile
import venv
from email.parser import HeaderParser
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import mmdet
import pytest
import torch
from conftest import ROOT, run
from mmengine.config import Config
from mmengine.config.utils import _get_cfg_metainfo
from mmengine.fileio import load

from cenet_mmdet import __version__

PARTS = ['cenet_mmdet', 'configs', 'tools', 'tests', 'docs', 'setup.py', 'pyproject.toml',
         'MANIFEST.in', 'README.md', 'CHANGELOG.md', 'LICENSE', 'model-index.yml']
SDIST = 'from setuptools import build_meta; build_meta.build_sdist("dist")'

# One training step of Mask R-CNN with CE-ResNet-18, from scratch.
ONE_STEP = '''
model = dict(
    backbone=dict(depth=18, init_cfg=None, ce_cfg=dict(freeze='none')),
    neck=dict(in_channels=[64, 128, 256, 512]),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20), rcnn=dict(sampler=dict(num=8))))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(64, 64)),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    num_workers=0,
    dataset=dict(
        pipeline=train_pipeline, indices=2,
        metainfo=dict(classes=('disk', 'square', 'triangle', 'star', 'cross'))))
train_cfg = dict(max_epochs=1)
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
'''

WHERE = 'from importlib.util import find_spec; print(find_spec("cenet_mmdet").origin)'
LOOK = '''
import cenet_mmdet
print(cenet_mmdet.__version__)
print(cenet_mmdet.config_path('imagenet/ce_resnet50.py'))
'''


def pip(*arguments, **options):
    return run(sys.executable, '-m', 'pip', '--disable-pip-version-check', *arguments, **options)


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


def content(wheel):
    """Checksum and mode of each file by its name."""
    with ZipFile(wheel) as archive:
        return {info.filename: (info.CRC, stat.filemode(info.external_attr >> 16))
                for info in archive.infolist()}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Wheel, sdist and the sdist's wheel of a copy of the checkout in which people have worked."""
    folder = tmp_path_factory.mktemp('built')
    source = folder / 'source'
    source.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, source / part)
    names = {name for name in files_below(source) if '__pycache__' not in name}
    expected = {name for name in names if name.startswith('cenet_mmdet/')}
    expected |= {f'cenet_mmdet/.mim/{name}' for name in names
                 if name.startswith(('configs/', 'tools/', 'model-index.yml'))}
    for name in ('configs/__pycache__/mine.cpython-311.pyc', 'tools/__pycache__/x.pyc',
                 'tools/.train.py.swp', 'cenet_mmdet/__pycache__/y.pyc',
                 'build/lib/cenet_mmdet/.mim/configs/of_an_earlier_build.py'):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    before = files_below(source)

    def build_wheel(of, to):
        pip('wheel', '--no-index', '--no-deps', '--no-build-isolation', '--wheel-dir', to, of)
        return next(to.glob('*.whl'))

    wheel = build_wheel(source, folder / 'wheel')
    run(sys.executable, '-c', SDIST, cwd=source)
    sdist = next((source / 'dist').glob('*.tar.gz'))
    left = {name for name in files_below(source) - before
            if not name.startswith(('build/', 'dist/', 'cenet_mmdet.egg-info/'))}
    wheel_of_sdist = build_wheel(sdist, folder / 'wheel_of_sdist')
    return SimpleNamespace(source=source, expected=expected, left=left, wheel=wheel, sdist=sdist,
                           wheel_of_sdist=wheel_of_sdist)


def new_environment(folder):
    """Python of a virtual environment with nothing in it, and its site-packages."""
    venv.create(folder, symlinks=True)
    return folder / 'bin' / 'python', next(folder.glob('lib/python*/site-packages'))


def pip_install(python, *arguments):
    pip('--python', python, 'install', '--no-index', *arguments)


def add_libraries(packages):
    """Those of the tests. In a folder that a .pth file names, Python reads no further .pth file."""
    (packages / 'libraries.pth').write_text(sysconfig.get_path('purelib'))


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """An environment with the wheel; the libraries are those of the tests, the checkout is not."""
    python, packages = new_environment(tmp_path_factory.mktemp('environment'))
    pip_install(python, built.wheel)
    add_libraries(packages)
    package = packages / 'cenet_mmdet'
    assert run(python, '-c', WHERE, cwd=packages.parent).stdout.strip() == f'{package}/__init__.py'
    return SimpleNamespace(python=python, package=package)


class TestArchives:

    def test_the_wheel_has_package_configs_and_tools_and_nothing_else(self, built):
        names = {name for name in content(built.wheel) if '.dist-info/' not in name}
        assert names == built.expected

    def test_the_sdist_has_them_in_the_same_places(self, built):
        with tarfile.open(built.sdist) as archive:
            names = {member.name.partition('/')[2] for member in archive if member.isfile()}
        assert {name for name in names if name.startswith('cenet_mmdet/')} == built.expected
        assert {'README.md', 'LICENSE', 'setup.py', 'pyproject.toml'} <= names
        assert not [name for name in names if name.startswith(('tests/', 'configs/', 'tools/'))]

    def test_the_sdist_gives_the_same_wheel(self, built):
        """RECORD aside, to the bit and with the same permissions."""
        first, second = content(built.wheel), content(built.wheel_of_sdist)
        record, = (name for name in first if name.endswith('/RECORD'))
        del first[record], second[record]
        assert first == second

    def test_launchers_stay_executable(self, built):
        modes = content(built.wheel)
        for path in built.source.glob('tools/[a-z]*'):
            if path.is_file():
                executable = modes[f'cenet_mmdet/.mim/tools/{path.name}'][1].endswith('x')
                assert executable is bool(path.stat().st_mode & 0o111), path.name

    def test_building_writes_no_file_into_the_sources(self, built):
        assert built.left == set()

    def test_nothing_is_required(self, built):
        with ZipFile(built.wheel) as archive:
            name, = (name for name in archive.namelist() if name.endswith('/METADATA'))
            metadata = HeaderParser().parsestr(archive.read(name).decode())
        requirements = metadata.get_all('Requires-Dist')
        assert [part for part in requirements if 'extra ==' not in part] == []
        assert set(metadata.get_all('Provides-Extra')) >= {'tools', 'pretrain', 'onnx', 'dev'}


def test_beside_an_old_mmdet_and_without_torch(built, tmp_path):
    """pip brings and changes nothing; configs are found and the command answers nevertheless."""
    python, packages = new_environment(tmp_path / 'environment')
    old = packages / 'mmdet-2.28.2.dist-info'
    old.mkdir()
    (old / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmdet\nVersion: 2.28.2\n')
    (old / 'RECORD').touch()
    pip_install(python, built.wheel)
    listed = json.loads(pip('--python', python, 'list', '--format', 'json').stdout)
    assert {entry['name']: entry['version'] for entry in listed} == {
        'cenet-mmdet': __version__, 'mmdet': '2.28.2'}
    version, config = run(python, '-c', LOOK, cwd=tmp_path).stdout.split()
    assert version == __version__
    assert config == str(packages / 'cenet_mmdet/.mim/configs/imagenet/ce_resnet50.py')
    command = python.parent / 'cenet-mmdet'
    assert 'configs' in run(command, '--help', cwd=tmp_path).stdout
    assert 'mask_rcnn_ce_r50.py' in run(command, 'configs', 'list', cwd=tmp_path).stdout


class TestInstalled:

    @pytest.mark.parametrize('tool', ['cenet_mmdet', 'mmdet'])
    def test_one_step_with_a_shipped_base(self, tool, installed, shapes, tmp_path):
        """By the installed tool, and by MMDetection's own, which imports no plugin before."""
        base = "__import__('cenet_mmdet').config_path('mask_rcnn_ce_r50.py')"
        (tmp_path / 'mine.py').write_text(f'_base_ = {base}\n{ONE_STEP}')
        package = installed.package if tool == 'cenet_mmdet' else Path(mmdet.__file__).parent
        run(installed.python, package / '.mim' / 'tools' / 'train.py', 'mine.py', cwd=tmp_path,
            env=dict(COCO_ROOT=str(shapes)))
        state = torch.load(tmp_path / 'work_dirs/mine/epoch_1.pth', weights_only=False)
        assert state['state_dict']['backbone.layer2.0.ce.num_batches_tracked'] == 1

    def test_launchers_run_in_place(self, installed, tmp_path):
        """As a program of its own, so it has to be executable."""
        launcher = installed.package / '.mim' / 'tools' / 'dist_train.sh'
        assert 'CONFIG GPUS' in run(launcher, '--help', cwd=tmp_path).stdout

    def test_mmengine_finds_the_entry_of_a_config(self, installed):
        entry = _get_cfg_metainfo(str(installed.package), 'imagenet/ce_resnet50.py')
        assert entry['Name'] == 'ce_resnet50'
        assert (installed.package / '.mim' / entry['Config']).is_file()


def test_an_editable_install_uses_the_configs_of_the_checkout(built, tmp_path):
    python, packages = new_environment(tmp_path / 'environment')
    add_libraries(packages)  # setuptools is one of them
    pip_install(python, '--ignore-installed', '--no-build-isolation', '--editable', built.source)
    (packages / 'libraries.pth').unlink()  # importing them takes seconds
    code = 'import cenet_mmdet as c; print(c.config_path("mask_rcnn_ce_r50.py"))'
    out = run(python, '-c', code, cwd=tmp_path).stdout
    assert out.strip() == str(built.source / 'configs' / 'mask_rcnn_ce_r50.py')
    assert not (built.source / 'cenet_mmdet' / '.mim').exists()


WITHOUT = '''
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools', 'cv2', 'matplotlib'):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from cenet_mmdet import CE, insert_ce
from cenet_mmdet.deploy import fuse_ce
ce = CE(32)
x = torch.randn(2, 32, 4, 4, requires_grad=True)
ce(x).sum().backward()
ce.eval()(x)
CE(32).load_state_dict(ce.state_dict())
network = torch.nn.Sequential(torch.nn.Conv2d(32, 8, 1), torch.nn.BatchNorm2d(8))
network = insert_ce(network, '1')
network(x)
fuse_ce(network.eval(), x)
print('works with torch alone')
'''


def test_layers_insertion_and_folding_need_torch_alone(tmp_path):
    assert 'works with torch alone' in run(sys.executable, '-c', WITHOUT, cwd=tmp_path).stdout


def test_make_help_lists_the_commands():
    out = run('make', '-C', ROOT, 'help').stdout
    for command in ('make demo', 'make test', 'make lint', 'make setup'):
        assert command in out


@pytest.fixture(scope='module')
def models():
    """Entries of the metafiles, as MMEngine and MIM read them."""
    metafiles = [load(ROOT / path) for path in load(ROOT / 'model-index.yml')['Import']]
    collections = {c['Name'] for metafile in metafiles for c in metafile.get('Collections', ())}
    models = [model for metafile in metafiles for model in metafile['Models']]
    assert {model['In Collection'] for model in models} == collections
    return models


class TestMetafiles:

    def test_every_config_has_an_entry_of_its_own(self, models):
        configs = [path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/**/*.py')
                   if path.parent.name not in ('_base_', 'demo')]
        assert sorted(model['Config'] for model in models) == sorted(configs)
        assert len({model['Name'] for model in models}) == len(models)

    def test_no_result_of_the_papers_passes_for_ours(self, models):
        assert not [m['Name'] for m in models if 'Results' in m or 'Weights' in m]

    @pytest.mark.parametrize('path', ['mask_rcnn_ce_r50.py', 'mask_rcnn_ce_r50_1x.py',
                                      'imagenet/ce_resnet50.py', 'cifar10/ce_vgg16.py'])
    def test_what_an_entry_says_is_what_the_config_does(self, path, models):
        entry, = (model for model in models if model['Config'] == f'configs/{path}')
        cfg = Config.fromfile(ROOT / 'configs' / path)
        assert entry['Metadata']['Epochs'] == cfg.train_cfg.max_epochs
        assert entry['Metadata']['Batch Size'] == cfg.auto_scale_lr.base_batch_size
