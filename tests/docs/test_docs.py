"""README.md and docs/*.md: every example runs, and every link leads to something.

    block                             what is done with it
    ```python                         runs; the blocks of a page share one namespace, see `preset`
    ```python that starts as CONFIG   is read as a config; its hooks and its model are built
    ```bash                           the programs' own parsers read the commands; `make test-long`
                                      runs them as typed, except those in sandbox.LEFT_OUT
    UNTESTED                          citations, folder trees, lines of logs: nothing
"""
import re
import sys
import textwrap
from itertools import dropwhile

import pytest
import torch
from conftest import ROOT, run
from helpers import sandbox
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS

from cenet_mmdet import CE, DBN, CEResNet, IterNorm
from cenet_mmdet.cli import parser as cenet_mmdet_parser
from cenet_mmdet.engine.run_config import run_parser
from cenet_mmdet.models.build import load_config

CONFIG = ('_base_ = ', 'custom_hooks = ')
UNTESTED = ('bibtex', 'text', '')
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCED = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """Line numbers and texts of a page's blocks in a language."""
    text = page.read_text()
    return [(text[:match.start()].count('\n') + 1, textwrap.dedent(match[3]))
            for match in FENCED.finditer(text) if match[2] == language]


def script(page):
    return '\n'.join(text for _, text in blocks(page, 'bash'))


def prose(page):
    return FENCED.sub('', page.read_text())


def preset():
    """What the python blocks of a page may use without an import."""
    torch.manual_seed(0)
    model, images = CEResNet(18, base_channels=8, stem_channels=8), torch.randn(2, 3, 64, 64)
    model(images)  # sets the running statistics
    return dict(torch=torch, nn=torch.nn, model=model, images=images)


def build(cfg):
    """The model of a config, without memory for its weights."""
    scope = cfg.get('default_scope', 'mmdet')
    with MODELS.switch_scope_and_registry(scope) as registry, torch.device('meta'):
        return registry.build(cfg.model)


every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
every_script = pytest.mark.parametrize('page', [*filter(script, PAGES)], ids=lambda page: page.name)


@every_page
def test_every_block_is_of_a_known_language(page):
    languages = {match[2] for match in FENCED.finditer(page.read_text())}
    assert languages <= {'python', 'bash', *UNTESTED} and '```' not in prose(page)


@every_page
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = preset()
    for line, text in blocks(page, 'python'):
        if not text.startswith(CONFIG):
            exec(compile('\n' * line + text, str(page), 'exec'), names)


@pytest.mark.parametrize('text', [
    pytest.param(text, id=f'{page.name}:{line}') for page in PAGES
    for line, text in blocks(page, 'python') if text.startswith(CONFIG)])
def test_config_is_built(text, tmp_path):
    (tmp_path / 'config.py').write_text(text)
    cfg = load_config(tmp_path / 'config.py')
    for hook in cfg.get('custom_hooks', []):
        assert isinstance(HOOKS.build(hook), Hook)
    if 'model' in cfg:
        model = build(cfg)
        assert any(isinstance(module, (CE, DBN, IterNorm)) for module in model.modules())
        for key in cfg.get('optim_wrapper', {}).get('paramwise_cfg', {}).get('custom_keys', {}):
            assert any(key in name for name, _ in model.named_parameters())


class TestCommands:

    @every_script
    def test_parsers_read_them(self, page, tool_here, tmp_path):
        for program, *arguments in sandbox.commands(script(page), tmp_path):
            if program == 'make':
                run('make', '--dry-run', *arguments, cwd=ROOT)
            elif program == 'cenet-mmdet':
                cenet_mmdet_parser().parse_args(arguments)
            elif program == 'pip':
                assert_stopped(run(sys.executable, '-m', 'pip', *arguments, '--stop', check=False))
            else:  # python, or torchrun or srun behind options of their own
                path, *arguments = dropwhile(lambda part: not part.endswith('.py'), arguments)
                assert all((ROOT / part).exists() for part in arguments
                           if part.startswith('configs/'))
                if '--cfg-options' in arguments:
                    known, _ = run_parser('').parse_known_args(arguments)
                    build(load_config(ROOT / known.config, known.cfg_options))
                name = path.rpartition('tools/')[2]
                assert_stopped(tool_here(name, *arguments, '--stop', cwd=ROOT))

    @pytest.fixture(scope='class')
    @staticmethod
    def new_sandbox(tmp_path_factory):
        return sandbox.build(tmp_path_factory.mktemp('sandbox'))

    @pytest.mark.long
    @every_script
    def test_they_run(self, page, new_sandbox, tmp_path):
        sandbox.run(script(page), new_sandbox, tmp_path / 'sandbox')


def assert_stopped(result):
    """A parser has read all arguments, and refuses the unknown one behind them."""
    error = result.stderr.rstrip()
    assert error.endswith(('unrecognized arguments: --stop', 'no such option: --stop')), error


@every_page
def test_links_resolve(page):
    for target in re.findall(r'(?:\]\(|src="|href=")([^)"\s]+)', prose(page)):
        if '://' not in target:
            path, _, anchor = target.partition('#')
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            if anchor:  # GitHub's name of a heading
                text = re.sub(r'[^\w\n -]', '', prose(file).lower()).replace(' ', '-')
                assert f'\n-{anchor}\n' in f'\n{text}', target


@every_page
def test_files_named_in_the_text_exist(page):
    names = re.findall(r'(?<![\w/])(?:tests|tools|configs|cenet_mmdet|docs)/[\w./]*\w',
                       page.read_text())
    assert [name for name in names if not list(ROOT.glob(f'{name}*'))] == []
