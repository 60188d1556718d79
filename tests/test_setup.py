"""The set-up script's own behaviour; its work is what made the environment of these tests."""
import re
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / 'tools'))
import setup_env
from setup_env import SetupError, Steps, ninja_progress, pip_progress


@pytest.fixture
def steps(tmp_path):
    return Steps(log=tmp_path / 'setup.log', marker=tmp_path / 'INTERRUPTED')


def test_the_environment_of_these_tests_is_complete():
    """The final check itself: operators run, versions are the pinned ones."""
    out = run(sys.executable, '-W', 'ignore', '-c', setup_env.CHECK).stdout
    for pin in (setup_env.TORCH[0], setup_env.MMENGINE, setup_env.MMCV, setup_env.MMDET):
        assert setup_env.pinned(sys.executable, pin), pin
    assert re.search(r'torch 2\.13\.0\S*, mmengine 0\.10\.12, mmcv 2\.3\.6 .*operators run on cpu',
                     out)


def test_a_failed_step_says_what_to_do(steps):
    command = [sys.executable, '-c', 'print("the reason"); raise SystemExit(3)']
    with pytest.raises(SetupError, match=r'"torch" failed .*setup\.log.*Try again') as error:
        steps.run('torch', command, 'Try again.')
    assert 'the reason' in error.value.output
    assert 'the reason' in steps.log.read_text()


def test_an_interrupted_step_is_repeated(steps):
    """Whatever it had installed by then is not trusted."""
    with pytest.raises(SetupError):
        steps.run('torch', [sys.executable, '-c', 'raise SystemExit(1)'], '')
    again = Steps(steps.log, steps.marker)
    assert again.interrupted == 'torch'
    commands = []
    again.run = lambda title, command, *_, **__: commands.append(command)
    again.pip('torch', 'torch==2.13.0', python='python')
    again.pip('mmdet', 'mmdet', python='python')
    assert ['--force-reinstall' in command for command in commands] == [True, False]


def test_a_finished_step_is_not(steps):
    steps.run('torch', [sys.executable, '-c', ''], '')
    assert Steps(steps.log, steps.marker).interrupted is None


def test_progress_of_a_compilation():
    progress = ninja_progress()
    assert progress('building mmcv._ext extension') is None
    assert progress('[1/78] c++ -MMD nms.cpp') == 'compiled 1 of 78 files'
    assert re.fullmatch(r'compiled 40 of 78 files, about \d+ min left', progress('[40/78] c++'))
    assert pip_progress('  Downloading torch-2.13.0.whl (190 MB)').endswith('(190 MB)')
    assert pip_progress('some other line') is None


def test_an_old_python_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
    with pytest.raises(SetupError, match=r'needs Python >= 3\.10.*PYTHON=python3\.11'):
        setup_env.set_up(tmp_path / 'venv')
    assert not (tmp_path / 'venv').exists()


def test_a_missing_compiler_is_named(steps, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(SetupError, match=r'C\+\+17 compiler.*apt-get install g\+\+'):
        setup_env.build_mmcv(steps, sys.executable, tmp_path / 'build')


def test_a_gpu_without_a_cuda_compiler_is_refused(steps, monkeypatch, tmp_path):
    """Rather than compiling operators that the GPU cannot run."""
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: name == 'c++' or None)
    monkeypatch.delenv('CUDA_HOME', raising=False)
    with pytest.raises(SetupError, match=r'GPU, but no CUDA compiler.*nvcc'):
        setup_env.build_mmcv(steps, sys.executable, tmp_path / 'mmcv-torch-cuda')
