"""Looks at an environment and a config, and says what is wrong and how to mend it."""
import contextlib
import io
import platform
import sys
import warnings
from typing import List

from .checks import Environment, Problem, look_up, problems_of, run_operators
from .configs import find_config
from .environment import Library, libraries, one_line
from .info import table
from .job import libraries_of, missing_for
from .pairings import LEGACY, MAINTAINED, departures, line_of, move


def run(arguments) -> int:
    """Print what was found; 0 if the config can be trained here, else 1."""
    config = find_config(arguments.config)
    print(f'Can {config.name} be trained here?', end='\n\n', flush=True)
    required = _libraries_of(config)
    with _quiet():
        env = _environment(required)
        problems = problems_of(env)
        job, unchecked = _job(config, env)
    serious = [problem for problem in problems if problem.serious]
    warned = [problem for problem in problems if not problem.serious]
    if not serious:
        warned += _pairing(env)

    _print_environment(env)
    _print_problems('Problems of the environment', serious)
    _print_problems('Warnings', warned)
    _print_problems(f'Data and weights of {config.name}', job)
    if unchecked:
        print(f'Data and weights of {config.name} were not looked at: {unchecked}\n')
    print(f'Verdict: {_verdict(config.name, serious, job, unchecked)}')
    return int(bool(serious or job or unchecked))


@contextlib.contextmanager
def _quiet():
    """What libraries print, log and warn of when they are imported is not part of the report."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), \
            warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _libraries_of(config):
    try:
        return libraries_of(config)
    except SyntaxError as error:
        sys.exit(f'config cannot be read: {config}, line {error.lineno}: {error.msg}')


def _environment(required) -> Environment:
    installed = libraries()
    works = {name for name, library in installed.items() if not library.error}
    return Environment(installed, required, line_of(installed),
                       run_operators() if {'torch', 'mmcv'} <= works else {}, look_up(installed))


def _job(config, env: Environment):
    """Problems with the config's files; and why they could not be looked for, or ''."""
    for name in ('torch', 'mmengine'):
        if not env.works(name):
            return [], f'{name} cannot be imported.'
    try:
        return missing_for(config, env.installed), ''
    except Exception as error:  # of MMEngine's reading of a config, which runs code
        return [], f'the config cannot be read ({one_line(error)}).'


def _pairing(env: Environment) -> List[Problem]:
    """A warning if no such combination of versions is known to work."""
    differ = departures(env.line, env.installed)
    if not differ:
        return []
    torch_differs = any(text.startswith('torch ') for text in differ)
    return [Problem(f'this combination of versions is untested: {", ".join(differ)}',
                    () if torch_differs else move(['mmengine', 'mmcv', 'mmdet'], env.line,
                                                  env.installed), serious=False)]


def _print_environment(env: Environment) -> None:
    print(f'python {platform.python_version()} on {platform.platform()}, {sys.executable}')
    print(table(_row(library, env) for library in env.installed.values()))
    ran = ' and '.join(device for device, error in env.operators.items() if not error)
    print(f"\nmmcv's operators run on: {ran or 'no device'}")
    for library, names in env.registries.items():
        print(f'{library} finds the layers and backbones'
              + (f', except {", ".join(names)}' if names else ''))
    differ = departures(env.line, env.installed)
    print(f'versions: {"untested, nearest to" if differ else "as tested in"} the {env.line.name} '
          f'line\n  known to work: {MAINTAINED}\n  known to work: {LEGACY}\n')


def _row(library: Library, env: Environment) -> List[str]:
    origin = ', '.join(f'{found.metadata["Name"]} {found.version}'
                       for found in library.distributions) or f'no distribution: {library.folder}'
    state = 'fails' if library.error else 'ok'
    if library.name == 'torch' and not library.error:
        state = f'ok, {_cuda()}'
    return [f'  {library.name}', origin, state]


def _cuda() -> str:
    import torch
    build = f'built for CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU build'
    if not torch.cuda.is_available():
        return f'{build}, no GPU seen'
    return f'{build}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}'


def _print_problems(title: str, problems: List[Problem]) -> None:
    """The problems under the commands that mend them, each set of commands once."""
    if not problems:
        return
    print(f'{title}:')
    by_fix = {}
    for problem in problems:
        by_fix.setdefault(problem.fix, []).append(problem.text)
    for fix, texts in by_fix.items():
        print(*(f'  - {text}' for text in texts), sep='\n')
        print(*(f'        {command}' for command in fix), '', sep='\n')


def _verdict(config: str, serious, job, unchecked: str) -> str:
    if serious or (unchecked and not job):
        return f'{config} cannot be trained before the problems above are mended.'
    if job:
        return f'the environment is fine; {config} lacks data or weights.'
    return f'{config} can be trained here.'
