"""README.md and docs/: every example runs, every link leads somewhere, every message is real."""
import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import pages, sandbox

# isort: off
import cenet_mmdet.models.mmpretrain  # noqa: F401 - before mmpretrain, which asks for torchvision
# isort: on
from conftest import ROOT
from helpers.pages import PAGES, blocks, commands, config, unknown_keys
from mmdet.models import ResNet
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope

from cenet_mmdet import CE, CEResNet
from cenet_mmdet.cli import parser as command_line

LANGUAGES = {'python', 'bash', 'bibtex', ''}  # the last: trees of folders and lines of logs


def example(block):
    return pytest.param(block, id=block.name)


def is_config(block):
    """Whether a python example is a config: it says so, or does nothing but assign."""
    return bool(re.search('^(_base_|custom_imports) = ', block.text, re.MULTILINE)) or all(
        isinstance(node, ast.Assign) for node in ast.parse(block.text).body)


PYTHON = [block for page in PAGES for block in blocks(page, 'python')]
BASH = [block for page in PAGES for block in blocks(page, 'bash')]


def test_every_fenced_example_is_of_a_known_kind():
    """Those of another language would be run by no test."""
    for page in PAGES:
        fences = re.findall(r'^\s*```(\w*)', page.read_text(), re.MULTILINE)
        assert set(fences) <= LANGUAGES, page.name
        assert len(fences) == 2 * sum(len(blocks(page, language)) for language in LANGUAGES)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return pages.world(tmp_path_factory.mktemp('docs') / 'world')


class TestConfigs:
    """Python examples that are configs: written to a file, read, their model and hooks built."""

    @pytest.mark.parametrize('block', [example(b) for b in PYTHON if is_config(b)])
    def test_is_built(self, block, folder, tmp_path):
        (tmp_path / 'mine.py').write_text(block.text)
        cfg = Config.fromfile(tmp_path / 'mine.py')
        self.check_keys(block, cfg, folder)
        scope = cfg.get('default_scope', 'mmdet')
        init_default_scope(scope)
        for hook in cfg.get('custom_hooks', []):
            assert isinstance(HOOKS.build(hook), Hook)
        if 'model' in cfg:
            # without the memory and the initial values, which take most of the time
            with MODELS.switch_scope_and_registry(scope) as registry, torch.device('meta'):
                model = registry.build(cfg.model)
            assert any(isinstance(module, CE) for module in model.modules())
            self.check_learning_rates(cfg, model)

    @staticmethod
    def check_keys(block, cfg, folder):
        """Each key overrides one of the base's, or is an argument of what is built."""
        mine = {}
        exec(re.sub('^_base_ = .*$', '', block.text, flags=re.MULTILINE), mine)
        used = {node.id for node in ast.walk(ast.parse(block.text))
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        mine = {key: value for key, value in mine.items() if key not in {*used, '__builtins__'}}
        base = re.search(r'^_base_ = .*$', block.text, re.MULTILINE)
        path = folder / f'{re.sub("[^a-z0-9]+", "_", base.group()) if base else "empty"}.py'
        path.write_text(base.group() if base else '')
        assert unknown_keys(config(path), cfg, pages.flat_keys(mine)) == []

    @staticmethod
    def check_learning_rates(cfg, model):
        """Where an example gives some parameters a rate of their own, these are there."""
        from mmengine.optim import build_optim_wrapper
        custom = cfg.get('optim_wrapper', {}).get('paramwise_cfg', {}).get('custom_keys', {})
        if not custom:
            return
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        groups = {id(p): group for group in wrapper.param_groups for p in group['params']}
        for key, options in custom.items():
            found = [groups[id(p)] for name, p in model.named_parameters()
                     if key in name and p.requires_grad]
            assert found, key
            lr = cfg.optim_wrapper.optimizer.lr * options.get('lr_mult', 1)
            assert all(group['lr'] == pytest.approx(lr) for group in found)

    def test_an_unknown_key_would_be_seen(self, tmp_path):
        path = tmp_path / 'c.py'
        path.write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n")
        before = Config.fromfile(path)
        path.write_text(path.read_text() + "custom_imports = dict(imports=['cenet_mmdet'])\n"
                        "model = dict(backbone=dict(type='CEResNet', ce_cgf=1, ce_cfg=dict(group=1"
                        ', eps=1e-3)), bbox_head=dict(num_classes=5))\nhooks = 1')
        keys = ['model.backbone.ce_cgf', 'model.backbone.ce_cfg.group', 'model.backbone.ce_cfg.eps',
                'model.bbox_head.num_classes', 'hooks']
        assert unknown_keys(before, Config.fromfile(path), keys) == [keys[0], keys[1], keys[4]]


# Names that the examples take for granted: torch, nn, a trained network and images.
MODELS_OF_PAGES = {'README.md': lambda: ResNet(50, base_channels=8, stem_channels=8)}


def names_taken_for_granted(page):
    torch.manual_seed(0)
    small = MODELS_OF_PAGES.get(page.name,
                                lambda: CEResNet(18, base_channels=8, stem_channels=8))
    model, images = small(), torch.randn(2, 3, 64, 64)
    model.train()
    model(images)
    return dict(torch=torch, nn=torch.nn, model=model, images=images)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Python examples that are no configs, one after the other in one namespace."""
    monkeypatch.chdir(tmp_path)
    found = [block for block in blocks(page, 'python') if not is_config(block)]
    names = names_taken_for_granted(page) if found else {}
    for block in found:
        exec(compile('\n' * block.line + block.text, str(page), 'exec'), names)


class TestCommands:
    """Bash examples: run by bash, with stand-ins for what takes time, which must accept them."""

    @pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
    def test_of_a_page(self, page, folder):
        script = '\n'.join(block.text for block in blocks(page, 'bash'))
        for command in commands(script, folder):
            getattr(self, f'check_{command[0].replace("-", "_")}')(command[1:], folder)

    def check_python(self, command, folder):
        arguments = pages.arguments_of(command, folder)
        configs = [argument for argument in command[1:] if argument.endswith('.py')]
        for path in configs:
            # those in work_dirs are written by the runs before
            assert path.startswith('work_dirs/') or (folder / path).is_file(), path
        options = getattr(arguments, 'cfg_options', None)
        if options:
            before, after = config(folder / configs[0]), config(folder / configs[0])
            after.merge_from_dict(options)
            assert unknown_keys(before, after, list(options)) == []

    def check_torchrun(self, command, folder):
        tool = next(index for index, argument in enumerate(command)
                    if argument.endswith(('train.py', 'test.py')))
        assert all(re.fullmatch(r'--[a-z-]+=[\w.]+', option) for option in command[:tool])
        self.check_python([f'tools/{Path(command[tool]).name}', *command[tool + 1:]], folder)

    def check_srun(self, command, folder):
        start = command.index('python')
        assert command[start + 1] == '-u'
        self.check_python([f'tools/{Path(command[start + 2]).name}', *command[start + 3:]], folder)

    def check_cenet_mmdet(self, command, folder):
        command_line().parse_args(command)

    def check_make(self, command, folder):
        targets = re.findall('^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        assert set(command) <= set(targets)

    def check_pip(self, command, folder):
        assert command[:2] == ['install', '-e']
        path, extra = re.fullmatch(r'(\.)(?:\[(\w+)\])?', command[2]).groups()
        assert path
        if extra:
            from importlib.metadata import metadata
            assert extra in metadata('cenet-mmdet').get_all('Provides-Extra')

    @pytest.mark.parametrize('command', [
        ['tools/nothing.py'], ['tools/infer.py', '--config', 'c.py'],
        ['tools/train.py', 'configs/mask_rcnn_r50.py', '--no-such-option'],
        ['tools/train.py', 'configs/nothing.py'],
        ['tools/train.py', 'configs/mask_rcnn_r50.py', '--cfg-options',
         'model.backbone.no_such_key=1']], ids=' '.join)
    def test_a_wrong_command_would_be_seen(self, command, folder):
        with pytest.raises(AssertionError):
            self.check_python(command, folder)

    def test_each_stand_in_is_checked(self):
        assert all(hasattr(self, f'check_{name.replace("-", "_")}') for name in pages.STANDINS)


def test_lines_of_the_log_are_what_is_logged():
    text = (ROOT / 'docs/train.md').read_text()
    cfg = config(ROOT / 'configs/mask_rcnn_ce_r50.py').model.backbone
    with torch.device('meta'):
        for backbone in (MODELS.build({**cfg, '_scope_': 'mmdet'}), CEResNet(18, frozen_stages=1)):
            assert f'\n{backbone.describe_ce()}\n' in text


class TestRuns:
    """Bash examples as typed, page by page, in a world of small images and networks."""

    @pytest.fixture(scope='class')
    @staticmethod
    def new_world(tmp_path_factory):
        return sandbox.build(tmp_path_factory.mktemp('new') / 'world')

    @pytest.mark.long
    @pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'bash')],
                             ids=lambda page: page.name)
    def test_of_a_page(self, page, new_world, tmp_path):
        folder = tmp_path / 'world'
        shutil.copytree(new_world, folder, symlinks=True)
        script = '\n'.join(block.text for block in blocks(page, 'bash'))
        environment = dict(os.environ, COCO_ROOT='/data/coco',
                           CE_RESNET50_CHECKPOINT='/data/ce_resnet50.pth',
                           RESNET50_CHECKPOINT='/data/resnet50-torchvision.pth')
        result = sandbox.run(script, folder, environment)
        assert result.returncode == 0, result.stdout[-5000:]
        done = [json.loads(line) for line in (folder / 'commands.jsonl').read_text().splitlines()]
        print('\n'.join(f'{"left out: " + why if why else "ran"}: {line}' for line, why in done))

    def test_each_reason_to_leave_a_command_out_is_needed(self, folder):
        """Else the list would hide commands that could run."""
        lines = [' '.join(command) for page in PAGES for command in commands(
            '\n'.join(block.text for block in blocks(page, 'bash')), folder)]
        for part in sandbox.NOT_HERE:
            assert any(part in line for line in lines), part
        assert sum(any(part in line for part in sandbox.NOT_HERE) for line in lines) < 0.3 * len(
            lines)


# Set outside this project: by make, pip and torch.
FOREIGN_VARIABLES = {'PYTHON', 'PIP_FIND_LINKS', 'OMP_NUM_THREADS', 'PATH'}


def test_environment_variables_are_read_somewhere():
    sources = [*(ROOT / 'tools').iterdir(), *(ROOT / 'configs').rglob('*.py'), ROOT / 'Makefile',
               *(ROOT / 'cenet_mmdet').rglob('*.py')]
    known = ' '.join(path.read_text() for path in sources if path.is_file())
    for page in PAGES:
        names = re.findall(r'\b([A-Z][A-Z0-9_]{3,})=|`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`',
                           page.read_text())
        for name in {first or second for first, second in names} - FOREIGN_VARIABLES:
            assert re.search(rf'\b{name}\b', known), f'{page.name}: {name}'


class TestLinks:

    @staticmethod
    def anchors(page):
        """GitHub's names for the headings of a page."""
        text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
        return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}

    @pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
    def test_lead_somewhere(self, page):
        links = re.findall(r'\]\(([^)\s]+)\)', pages.prose(page))
        for target in links:
            if target.startswith('https://'):
                continue
            path, _, anchor = target.partition('#')
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            if anchor:
                assert anchor in self.anchors(file), target

    @pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
    def test_files_named_in_code_exist(self, page):
        """`tests/test_layer.py`, `cenet_mmdet/layers` and the like."""
        named = re.findall(r'\b((?:tests|tools|configs|cenet_mmdet|docs)/[\w./]*\w)',
                           page.read_text())
        for name in named:
            assert (ROOT / name).exists() or list(ROOT.glob(f'{name}*')), name

    def test_every_page_is_linked_from_the_readme_or_another(self):
        text = ' '.join(page.read_text() for page in PAGES)
        for page in PAGES[1:]:
            assert f'{page.name})' in text or f'{page.name}#' in text, page.name

    def test_no_path_of_a_single_machine(self):
        """Examples stand below /data; nothing of the machine that a page was written on."""
        for page in [*PAGES, *(ROOT / 'docs').glob('*.svg')]:
            paths = re.findall(r'(?<![\w./:*)\]}])/(?:\w+/)+\w*', page.read_text())
            assert all(path.startswith('/data/') for path in paths), (page.name, paths)
