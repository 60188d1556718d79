"""The set-up script's own behaviour; its work is what made the environment of these tests."""
import re
import subprocess
import sys

import pytest
from conftest import LEGACY, ROOT, run

sys.path.insert(0, str(ROOT / 'tools' / 'dev'))
import setup_env
from setup_env import STACKS, SetupError, Steps, ninja_progress, pip_progress

STACK = STACKS['legacy' if LEGACY else 'maintained']


@pytest.fixture
def steps(tmp_path):
    return Steps(tmp_path / 'setup.log')


def test_the_environment_of_these_tests_is_complete():
    """The final check itself: operators run, versions are the pinned ones."""
    out = run(sys.executable, '-W', 'ignore', '-c', setup_env.CHECK).stdout
    pins = (STACK.torch, STACK.mmengine, STACK.mmcv, STACK.mmdet)
    for pin in pins:
        assert setup_env.pinned(sys.executable, pin), pin
    torch, mmengine, mmcv, mmdet = (re.escape(pin.split('==')[1]) for pin in pins)
    assert re.search(rf'torch {torch}\S*, mmengine {mmengine}, mmcv {mmcv} .*, mmdet {mmdet}, '
                     'operators run on cpu', out)


def test_a_failed_step_says_what_to_do(steps):
    command = [sys.executable, '-c', 'print("the reason"); raise SystemExit(3)']
    with pytest.raises(SetupError, match=r'"torch" failed .*setup\.log.*Try again') as error:
        steps.run('torch', command, 'Try again.')
    assert 'the reason' in error.value.output
    assert 'the reason' in steps.log.read_text()


def test_a_wheel_without_working_operators_is_built_anew(steps, monkeypatch, tmp_path):
    """A wheel for another torch installs without complaint; what counts is that it loads."""
    done = []
    folder = tmp_path / 'mmcv-built'
    folder.mkdir()

    def build(*_):
        done.append('build')
        (folder / 'onedl_mmcv-2.3.6-own.whl').touch()

    monkeypatch.setattr(setup_env, 'build_folder', lambda python: folder)
    monkeypatch.setattr(setup_env, 'build_mmcv', build)
    monkeypatch.setattr(setup_env, 'operators_work', lambda python: 'build' in done)
    monkeypatch.setattr(setup_env, 'pinned', lambda *_: False)
    steps.pip = lambda title, *arguments, python: done.append(arguments[-1])
    setup_env.install_mmcv(steps, sys.executable, STACK.mmcv)
    assert done == [STACK.mmcv, 'build', str(folder / 'onedl_mmcv-2.3.6-own.whl')]
    # and the next environment takes the wheel built here
    done[:] = ['build']
    setup_env.install_mmcv(steps, sys.executable, STACK.mmcv)
    assert done[1:] == [str(folder / 'onedl_mmcv-2.3.6-own.whl')]


def test_an_environment_without_pip_is_completed(steps, tmp_path):
    """As an interruption during its creation leaves it."""
    venv = tmp_path / 'venv'
    run(sys.executable, '-m', 'venv', '--without-pip', venv)
    python = str(venv / 'bin/python')
    setup_env.create_venv(steps, venv, python)
    assert not subprocess.run([python, '-m', 'pip', '--version'], capture_output=True).returncode


def test_progress_of_a_compilation():
    progress = ninja_progress()
    assert progress('building mmcv._ext extension') is None
    assert progress('[1/78] c++ -MMD nms.cpp') == 'compiled 1 of 78 files'
    assert re.fullmatch(r'compiled 40 of 78 files, about \d+ min left', progress('[40/78] c++'))
    assert pip_progress('  Downloading torch-2.13.0.whl (190 MB)').endswith('(190 MB)')
    assert pip_progress('some other line') is None


@pytest.mark.parametrize(('name', 'version', 'pythons'), [
    ('maintained', (3, 9, 18), r'3\.10 to 3\.13'), ('legacy', (3, 12, 1), r'3\.9 to 3\.11')])
def test_a_python_without_builds_is_refused(name, version, pythons, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'version_info', version)
    with pytest.raises(SetupError, match=rf'needs Python {pythons}.*PYTHON=python3\.11'):
        setup_env.set_up(tmp_path / 'venv', STACKS[name])
    assert not (tmp_path / 'venv').exists()


def test_a_missing_compiler_is_named(steps, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(SetupError, match=r'C\+\+17 compiler.*apt-get install g\+\+'):
        setup_env.build_mmcv(steps, sys.executable, tmp_path / 'build', STACK.mmcv)


def test_a_gpu_without_a_cuda_compiler_is_refused(steps, monkeypatch, tmp_path):
    """Rather than compiling operators that the GPU cannot run."""
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: name == 'c++' or None)
    monkeypatch.delenv('CUDA_HOME', raising=False)
    with pytest.raises(SetupError, match=r'GPU, but no CUDA compiler.*nvcc'):
        setup_env.build_mmcv(steps, sys.executable, tmp_path / 'mmcv-torch-cuda', STACK.mmcv)
