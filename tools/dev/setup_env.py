#!/usr/bin/env python3
"""Create the project's virtual environment and prove that it works.

    python3 tools/dev/setup_env.py            # creates or completes .venv
    python3 tools/dev/setup_env.py --stack legacy --venv /tmp/ce

Safe to run again at any time, also after an interruption: what is complete is
recognised, and a compilation goes on where it stopped. Honours pip's own
variables (PIP_FIND_LINKS, PIP_INDEX_URL, ...). Needs only a Python >= 3.10, for
the legacy stack 3.9 to 3.11; the environment of the caller is never touched.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Not by way of the package, which imports torch, of whatever environment this is run in.
sys.path.insert(0, str(ROOT / 'cenet_mmdet' / 'utils'))
from stacks import STACKS  # noqa: E402

BUILD = ROOT / 'build'

# What the finished environment must be able to do, run inside it.
CHECK = '''
import cv2, mmcv, mmdet, mmengine, numpy, torch
import mmcv._ext
from mmcv.ops import batched_nms, get_compiling_cuda_version, roi_align
from mmdet.utils import register_all_modules
register_all_modules()
devices = ['cpu'] + ['cuda'] * torch.cuda.is_available()
for device in devices:
    boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]], device=device)
    kept = batched_nms(boxes, torch.tensor([.9, .8, .7], device=device),
                       torch.zeros(3, dtype=torch.long, device=device),
                       dict(type='nms', iou_threshold=.5))[1]
    if kept.tolist() != [0, 2]:
        raise SystemExit(f'nms on {device} kept boxes {kept.tolist()} instead of [0, 2]')
    rois = torch.tensor([[0., 0, 0, 8, 8]], device=device)
    pooled = roi_align(torch.ones(1, 2, 16, 16, device=device), rois, (7, 7))
    if not torch.equal(pooled, torch.ones_like(pooled)):
        raise SystemExit(f'roi_align on {device} is wrong on a constant map')
print(f'torch {torch.__version__}, mmengine {mmengine.__version__}, mmcv {mmcv.__version__} '
      f'(CUDA operators: {get_compiling_cuda_version()}), mmdet {mmdet.__version__}, '
      f'operators run on {" and ".join(devices)}')
'''


class SetupError(Exception):
    """A failed step; the message ends in what the user can do, `output` is the command's end."""

    def __init__(self, message, output=()):
        super().__init__(message)
        self.output = output


class Steps:
    """Runs commands one by one, showing what runs, for how long and how far it is."""

    def __init__(self, log):
        self.log, self.start = log, time.time()

    def say(self, text, end='\n'):
        minutes, seconds = divmod(int(time.time() - self.start), 60)
        print(f'[{minutes:2d}:{seconds:02d}] {text}', end=end, flush=True)

    def run(self, title, command, fix, cwd=None, progress=None):
        """Run one command into the log; `progress` turns its lines into a status text."""
        self.say(title)
        status = {'text': 'working'}
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(title, status, done), daemon=True)
        ticker.start()
        tail = []
        try:
            with open(self.log, 'a', encoding='utf-8') as log:
                log.write(f'\n### {title}\n{command}\n')
                process = subprocess.Popen(
                    command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, text=True, errors='replace')
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    tail = [*tail[-14:], line.rstrip()[:300]]
                    status['text'] = (progress and progress(line)) or status['text']
                code = process.wait()
        finally:
            done.set()
            ticker.join()
        if code:
            raise SetupError(f'"{title}" failed (whole log: {self.log}). {fix}', output=tail)

    def _tick(self, title, status, done):
        terminal = sys.stdout.isatty()
        while not done.wait(1 if terminal else 30):
            self.say(f'{title}: {status["text"]}', end='\033[K\r' if terminal else '\n')
        if terminal:
            print('\033[K', end='', flush=True)

    def pip(self, title, *arguments, python):
        self.run(title, [python, '-m', 'pip', 'install', '--disable-pip-version-check', *arguments],
                 'Check the network and PIP_FIND_LINKS / PIP_INDEX_URL, then run it again.',
                 progress=pip_progress)


def pip_progress(line):
    """What pip is busy with: 'Collecting torch', 'Downloading ... (190 MB)', ..."""
    found = re.match(r'\s*(Collecting|Downloading|Building|Installing|Processing) (.{1,80})', line)
    return found and found.group(0).strip()


def ninja_progress():
    """Turns ninja's '[45/132] c++ ...' lines into a share and an estimate of what is left."""
    began = skipped = None

    def progress(line):
        nonlocal began, skipped
        found = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        if not found:
            return None
        done, total = map(int, found.groups())
        if began is None:
            began, skipped = time.time(), done
        text = f'compiled {done} of {total} files'
        if done < skipped + 4:  # too few to tell how long the others take
            return text
        seconds_each = (time.time() - began) / (done - skipped)
        return f'{text}, about {max(1, round((total - done) * seconds_each / 60))} min left'

    return progress


def version_of(python, requirement):
    """Installed version of `name==version`, or None; reads metadata only, imports nothing."""
    name = re.split('[=<>]', requirement)[0]
    code = f'from importlib.metadata import version; print(version("{name}"))'
    answer = subprocess.run([python, '-c', code], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def pinned(python, requirement):
    version = version_of(python, requirement)
    # A local part (2.13.0+cpu) does not change which release it is.
    return version is not None and version.split('+')[0] == requirement.split('==')[1]


def operators_work(python):
    """mmcv's compiled operators load, with CUDA ones where torch sees a GPU."""
    code = ('import torch, mmcv._ext; from mmcv.ops import get_compiling_cuda_version as v; '
            'raise SystemExit(torch.cuda.is_available() and "." not in v())')
    return subprocess.run([python, '-c', code], capture_output=True).returncode == 0


def create_venv(steps, venv, python):
    """An interrupted creation leaves an interpreter without pip: pip is what is asked for."""
    complete = Path(python).exists() and not subprocess.run(
        [python, '-m', 'pip', '--version'], capture_output=True).returncode
    if not complete:
        steps.run('virtual environment', [sys.executable, '-m', 'venv', str(venv)],
                  'Install the venv module (Debian, Ubuntu: apt-get install python3-venv).')


def install_mmcv(steps, python, mmcv):
    """The wheel built here before; else one that is offered; else a build from source.

    Whichever is installed, its operators must load with this torch, and with a
    GPU they must be CUDA operators.
    """
    if pinned(python, mmcv) and operators_work(python):
        return
    folder = build_folder(python)
    if not list(folder.glob('*.whl')):
        try:
            # A wheel in pip's cache may have been built without operators: do not use it.
            install_wheel(steps, python, 'mmcv from a ready wheel', '--no-cache-dir',
                          '--only-binary', ':all:', mmcv)
        except SetupError:
            steps.say('no ready mmcv wheel: building it from source (10 to 30 minutes)')
        else:
            if operators_work(python):
                return
            steps.say('that wheel does not fit this torch or GPU: building mmcv from source')
        build_mmcv(steps, python, folder, mmcv)
    install_wheel(steps, python, 'mmcv as built', next(folder.glob('*.whl')))
    if not operators_work(python):
        raise SetupError('mmcv was built, but its operators do not load. '
                         f'Delete {folder} and run it again; the log is {steps.log}.')


def install_wheel(steps, python, title, *arguments):
    steps.pip(title, '--no-deps', '--force-reinstall', *map(str, arguments), python=python)


def build_folder(python):
    """One build folder per interpreter and torch build, so that no stale object is reused."""
    code = ('import sys, torch; print(f"mmcv-cp{sys.version_info[0]}{sys.version_info[1]}'
            '-torch{torch.__version__}" + "-cuda" * torch.cuda.is_available())')
    return BUILD / subprocess.check_output([python, '-c', code], text=True).strip()


def build_mmcv(steps, python, folder, mmcv):
    """Compile mmcv in place, so that a repeated run goes on where ninja stopped."""
    gpu = folder.name.endswith('-cuda')
    if not shutil.which('c++') and not os.environ.get('CXX'):
        raise SetupError('mmcv needs a C++17 compiler and none was found. '
                         'Install one (Debian, Ubuntu: apt-get install g++), then run it again.')
    if gpu and not (shutil.which('nvcc') or os.environ.get('CUDA_HOME')):
        raise SetupError('This machine has a GPU, but no CUDA compiler to build the operators '
                         'of mmcv with. Install the CUDA toolkit that torch was built for (see '
                         'python -c "import torch; print(torch.version.cuda)"), put nvcc on PATH '
                         'and run it again, or run it with CUDA_VISIBLE_DEVICES= for CPU only.')
    source = folder / mmcv.replace('-', '_').replace('==', '-')
    if not (source / 'setup.py').exists():
        fetch_source(steps, python, folder, source, mmcv)
    # mmcv would start at least four compilers, whatever the machine has.
    os.environ.setdefault('MAX_JOBS', str(len(os.sched_getaffinity(0))
                                          if hasattr(os, 'sched_getaffinity')
                                          else os.cpu_count() or 1))
    os.environ['MMCV_WITH_OPS'] = '1'
    # Without build isolation: in pip's own build environment torch is missing
    # and mmcv comes out without operators, silently.
    steps.run('mmcv: compiling the operators',
              [python, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation',
               '--wheel-dir', str(folder), str(source)],
              'If memory ran out, try again with MAX_JOBS=1.', progress=ninja_progress())


def fetch_source(steps, python, folder, source, mmcv):
    folder.mkdir(parents=True, exist_ok=True)
    steps.run('mmcv: source', [python, '-m', 'pip', 'download', '--no-deps',
                               '--no-build-isolation', '--no-binary', ':all:',
                               '--dest', str(folder), mmcv],
              'Check the network, then run it again.')
    archive = next(folder.glob('*.tar.gz'))
    partial = folder / 'partial'
    shutil.rmtree(partial, ignore_errors=True)
    shutil.unpack_archive(archive, partial)
    (partial / source.name).rename(source)


def check(steps, python):
    answer = subprocess.run([python, '-W', 'ignore', '-c', CHECK], capture_output=True, text=True)
    if answer.returncode:
        last = (answer.stderr.strip() or 'no message').splitlines()[-1]
        raise SetupError(f'The installed stack does not work: {last}. '
                         f'Delete {Path(python).parent.parent} and run the set-up again.')
    steps.say(answer.stdout.strip().splitlines()[-1])


def set_up(venv, stack):
    if not (ROOT / 'setup.py').is_file():
        raise SetupError(f'this tool sets up a checkout, and {ROOT} is none. In an environment of '
                         'your own, `cenet-mmdet doctor` says what is missing.')
    if not stack.runs_on(sys.version_info):
        version = '.'.join(map(str, sys.version_info[:3]))
        raise SetupError(f'The pinned stack needs Python {stack.pythons}, this is {version}. '
                         'Name another one, for example: make test PYTHON=python3.11')
    venv.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    python = str(venv / 'bin' / 'python')
    steps = Steps(BUILD / 'setup.log')
    ready = venv / 'READY'
    recipe = repr(stack) + Path(__file__).read_text() + (ROOT / 'setup.py').read_text()
    if ready.exists() and ready.read_text() == recipe:
        return
    ready.unlink(missing_ok=True)
    steps.say(f'setting up {venv} (log: {steps.log})')
    create_venv(steps, venv, python)
    steps.pip('build tools', *stack.basics, python=python)
    if not pinned(python, stack.torch):
        steps.pip('torch', stack.torch, stack.numpy, python=python)
    if not pinned(python, stack.mmengine):
        # with what mmcv imports, so that its operators can be tried before mmdet comes
        steps.pip('mmengine', stack.mmengine, *stack.opencv, 'pillow', stack.numpy, python=python)
    install_mmcv(steps, python, stack.mmcv)
    # One resolution over all pins, so that no dependency moves another's.
    steps.pip('mmdet, mmpretrain and cenet-mmdet', '--no-build-isolation', *stack.pins,
              '--editable', f'{ROOT}[dev]', python=python)
    steps.pip('headless opencv', '--force-reinstall', '--no-deps', stack.opencv[0], python=python)
    check(steps, python)
    ready.write_text(recipe)
    steps.say('ready')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stack', choices=STACKS, default='maintained',
                        help="OneDL's maintained releases (default), or OpenMMLab's last ones")
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv',
                        help='folder of the virtual environment (default: .venv in the project)')
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    try:
        set_up(venv, STACKS[arguments.stack])
    except SetupError as error:
        print(*(f'    {line}' for line in error.output), sep='\n', file=sys.stderr)
        sys.exit(f'set-up: {error}')
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f'set-up: {error}. Check permissions and free space below {ROOT}; if the '
                 f'environment is damaged, delete {venv} and run it again.')
    except KeyboardInterrupt:
        sys.exit('set-up: interrupted. Run the same command again to go on.')


if __name__ == '__main__':
    main()
