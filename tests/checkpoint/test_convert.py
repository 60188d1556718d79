"""Checkpoints of other origins: converted by the tool, loaded as they are, or refused by name."""
import io
import logging
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, run, tool
from mmdet.models.backbones.resnet import ResNet
from mmengine.logging import MMLogger

from cenet_mmdet import CEResNet
from cenet_mmdet.checkpoint.convert import CheckpointError, to_ours, to_released

TOOL = ROOT / 'tools' / 'convert_checkpoint.py'
SLIM = dict(base_channels=8, stem_channels=8)


def trained(backbone):
    """The backbone with statistics of its own, as after some training."""
    backbone.train()
    with torch.no_grad():
        for value in backbone.parameters():
            value.add_(0.01 * torch.randn_like(value))
        backbone(torch.randn(2, 3, 64, 64))
    return backbone


def released_entries(backbone):
    """The backbone's entries with the authors' names and shapes, written out layer by layer."""
    layers = dict(backbone.ce_layers())
    entries = {key: value for key, value in backbone.state_dict().items()
               if not key.startswith(tuple(f'{name}.' for name in layers))}
    for name, ce in layers.items():
        down, norm, _, up, _ = ce.reweighting
        values = {'x_weight': ce.lambda_logit,
                  'running_mean': ce.running_mean.reshape(ce.num_groups, ce.group_size, 1),
                  'running_wm': ce.running_whitening, 'AR.running_scale': ce.running_scale,
                  'AR.fc.0.weight': down.weight, 'AR.fc.1.weight': norm.weight,
                  'AR.fc.1.bias': norm.bias, 'AR.fc.3.weight': up.weight}
        entries.update({f'{name}.{key}': value.detach() for key, value in values.items()})
    return entries


def released_file(entries, path):
    """As the authors saved theirs, in 2020 and with the optimizer."""
    momentum = {0: {'momentum_buffer': torch.zeros(3)}}
    torch.save(dict(epoch=100, model='resnet50', state_dict=entries, best_prec1=torch.tensor(78.2),
                    optimizer=dict(state=momentum, param_groups=[dict(lr=0.1, params=[0])])),
               path, _use_new_zipfile_serialization=False)
    return path


def saved(checkpoint):
    """The bytes of its file; what are bytes already is a file of another kind."""
    if isinstance(checkpoint, bytes):
        return checkpoint
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def classifier(width=512, classes=10):
    return {'fc.weight': torch.randn(classes, width), 'fc.bias': torch.randn(classes)}


def with_prefix(prefix, entries):
    return {f'{prefix}{key}': value for key, value in entries.items()}


def assert_same(entries, others):
    assert entries.keys() == others.keys()
    for key, value in entries.items():
        assert value.dtype == others[key].dtype
        assert torch.equal(value, others[key]), key


def features(backbone):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone.eval()
    with torch.no_grad():
        return backbone(images)


def pretrained(depth, path, **options):
    backbone = CEResNet(depth, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **options)
    backbone.init_weights()
    return backbone


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """With inputs this small, two threads wait for each other; on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log(caplog):
    """Messages of MMEngine's logger, which does not propagate to pytest's."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope='module')
def ce18():
    torch.manual_seed(0)
    return trained(CEResNet(18))


@pytest.fixture(scope='module')
def ce50():
    """A slim one."""
    torch.manual_seed(0)
    return trained(CEResNet(50, **SLIM))


@pytest.fixture
def convert(monkeypatch, capsys, tmp_path):
    """The tool run in this process: its output, and the file it wrote as torch.load sees it."""
    def run_main(checkpoint, *options):
        (tmp_path / 'src.pth').write_bytes(saved(checkpoint))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', 'src.pth', 'dst.pth', *options])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capsys.readouterr().out, torch.load('dst.pth', weights_only=True)
    return run_main


class TestNames:

    @pytest.mark.parametrize('options', [dict(depth=18), dict(depth=50), dict(
        depth=50, deep_stem=True)], ids=str)
    def test_ours_to_released_and_back(self, options):
        backbone = trained(CEResNet(**options, **SLIM))
        released = to_released(backbone.state_dict())
        assert_same(released, released_entries(backbone))
        ours = to_ours(released)
        assert_same(ours, backbone.state_dict())
        assert_same(to_ours(ours), ours)


class TestConversion:

    def test_released_resnet_50_there_and_back(self, tmp_path):
        """As users type it: same bits at the end, same features in between."""
        torch.manual_seed(0)
        source = trained(CEResNet(50))
        entries = {**released_entries(source), **classifier(2048, 1000)}
        assert len(entries) == 432
        released_file(entries, tmp_path / 'resnet50_ce.pth.tar')

        out = tool(TOOL.name, 'resnet50_ce.pth.tar', 'ours.pth', cwd=tmp_path).stdout
        assert "recognised: authors' CE-ResNet, depth 50, classifier of 1000 classes" in out
        assert 'CE layers: 14' in out
        assert 'written: ours.pth, 446 entries' in out
        ours = torch.load(tmp_path / 'ours.pth', weights_only=True)
        note = ours['meta'].pop('note')
        assert 'CEResNet' in note
        assert ours['meta'] == dict(format_version=1, depth=50, ce_layers=14,
                                    source="authors' CE-ResNet", source_file='resnet50_ce.pth.tar')
        loaded = pretrained(50, tmp_path / 'ours.pth', ce_cfg=dict(freeze='all'))
        assert all(map(torch.equal, features(loaded), features(source)))

        tool(TOOL.name, 'ours.pth', 'back.pth.tar', '--to', 'released', cwd=tmp_path)
        back = torch.load(tmp_path / 'back.pth.tar', weights_only=True)
        assert_same(back.pop('state_dict'), entries)
        assert back == dict(epoch=0, model='resnet50')
        assert {path.name for path in tmp_path.iterdir()} == {
            'resnet50_ce.pth.tar', 'ours.pth', 'back.pth.tar'}

    @pytest.mark.parametrize('source', ['backbone', 'mmpretrain', 'detector', 'parallel', 'ours'])
    def test_every_source_gives_the_same_backbone(self, convert, ce18, source):
        entries = ce18.state_dict()
        head = classifier()
        whole = {**with_prefix('backbone.', entries), **with_prefix('head.', head)}
        detector = {**with_prefix('backbone.', entries), 'neck.conv.weight': torch.zeros(3),
                    'roi_head.bbox_head.fc_cls.weight': torch.zeros(81, 1024)}
        checkpoint, head, kind = {
            'backbone': (entries, {}, 'CE-ResNet'),
            'mmpretrain': (dict(meta=dict(epoch=1), state_dict=whole), head,
                           'mmpretrain classifier'),
            'detector': (dict(state_dict=detector), {},
                         'model with a backbone, such as a detector'),
            'parallel': (dict(state_dict=with_prefix('module.', released_entries(ce18))), {},
                         "authors' CE-ResNet"),
            'ours': (dict(state_dict={**entries, **head}, meta=dict(format_version=1)), head,
                     'CE-ResNet'),
        }[source]
        out, ours = convert(checkpoint)
        assert_same(ours['state_dict'], {**entries, **head})
        assert ours['meta']['source'] == kind
        assert f'recognised: {kind}, depth 18' in out
        assert ('classifier of 10 classes' if head else 'no classifier') in out

    @pytest.mark.parametrize(('depth', 'origin'), [
        (34, 'torchvision'), (50, 'mmpretrain'), (101, 'torchvision')])
    def test_plain_resnet(self, convert, depth, origin):
        """It has neither CE nor, in torchvision's oldest files, num_batches_tracked."""
        entries = {key: value for key, value in ResNet(depth).state_dict().items()
                   if origin == 'mmpretrain' or not key.endswith('num_batches_tracked')}
        head = classifier(512 if depth == 34 else 2048)
        expected = {**entries, **head}
        kind = 'ResNet without CE'
        if origin == 'mmpretrain':
            entries, head = with_prefix('backbone.', entries), with_prefix('head.', head)
            kind = 'mmpretrain classifier'
        out, ours = convert(dict(state_dict={**entries, **head}))
        assert f'recognised: {kind}, depth {depth}, classifier of 10 classes' in out
        assert 'CE layers: none, those of CEResNet will start at their initial values' in out
        assert ours['meta']['ce_layers'] == 0
        assert_same(ours['state_dict'], expected)

    def test_no_larger_storage_is_dragged_along(self, convert, ce18):
        whole = torch.randn(1000, 7, 7, 3, 64)
        entries = {**ce18.state_dict(), 'conv1.weight': whole[0].permute(3, 2, 0, 1)}
        _, ours = convert(dict(state_dict=entries))
        assert_same(ours['state_dict'], entries)
        for value in ours['state_dict'].values():
            assert value.is_contiguous()
            assert value.untyped_storage().nbytes() == value.nbytes
            assert type(value) is torch.Tensor

    def test_an_existing_file_is_replaced(self, convert, ce18, tmp_path):
        (tmp_path / 'dst.pth').write_text('old')
        _, ours = convert(ce18.state_dict())
        assert_same(ours['state_dict'], ce18.state_dict())


def state(*args, **kwargs):
    """Entries of a CEResNet with next to nothing in them, for files of a few kilobytes."""
    with torch.device('meta'):
        entries = CEResNet(*args, **kwargs).state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in entries.items()}


def plain(depth):
    return state(depth, ce_blocks=[()] * 4, ce_stem=False)


def without(name, entries):
    return {key: value for key, value in entries.items() if key != name}


def damaged_numbers():
    """The bytes of a file whose damage torch.load does not notice."""
    content = saved(dict(value=torch.full((4, ), 1.5)))
    numbers = np.full(4, 1.5, np.float32).tobytes()
    assert content.count(numbers) == 1
    return content.replace(numbers, np.full(4, -1.5, np.float32).tobytes())


# Command line, what SRC holds (a checkpoint or bytes), what the message says.
WRONG_FILES = {
    'missing': ('nowhere.pth dst.pth', dict, r'checkpoint not found: nowhere\.pth\. Give'),
    'no folder': ('src.pth missing/dst.pth', dict, r'folder not found: missing\. Create it'),
    'same file': ('src.pth ./src.pth', dict, r'same file: src\.pth\. Give another path for DST'),
    'truncated': ('src.pth dst.pth', lambda: saved(state(18))[:-3000],
                  r'src\.pth is damaged or was not written by torch\.save \(.+\)\. Get'),
    'wrong numbers': ('src.pth dst.pth', damaged_numbers,
                      r'src\.pth is damaged \(wrong checksum in .*\)\. Get'),
    'no tensors': ('src.pth dst.pth', lambda: dict(state_dict={}, meta=dict(epoch=3)),
                   r"src\.pth: it holds no tensors\. Expected is a state dict.*'state_dict'"),
    'no ce': ('src.pth dst.pth --to released', lambda: plain(18),
              r'no CE layers.*Leave out --to released'),
}
# More of what SRC may hold, and what the message says.
WRONG_ENTRIES = {
    'text': (lambda: b'<html>not found</html>', r'src\.pth is damaged or was not written by'),
    'list': (lambda: [torch.zeros(3)], 'it holds no tensors'),
    'other network': (lambda: {'features.0.weight': torch.zeros(3)},
                      r'no ResNet of depth 18, 34, 50, 101, 152: it has no entry of a block'),
    'three stages': (lambda: {key: value for key, value in plain(50).items()
                              if not key.startswith('layer4')},
                     r'it has blocks of three convolutions, \(3, 4, 6\) per stage'),
    'width': (lambda: {**plain(18), 'layer4.1.conv2.weight': torch.zeros(512, 8, 3, 3)},
              r'layer4\.1\.conv2\.weight is \(512, 8, 3, 3\) in the checkpoint and '
              r'\(512, 512, 3, 3\) in the network'),
    'missing': (lambda: without('bn1.running_var', state(18)),
                r'bn1\.running_var is missing in the checkpoint and \(64,\) in the network'),
    'missing of ce': (lambda: without('layer3.1.ce.running_scale', state(18)),
                      r'layer3\.1\.ce\.running_scale is missing in the checkpoint and \(1,\)'),
    'one more': (lambda: {**state(18), 'attention.weight': torch.zeros(3)},
                 r'attention\.weight is \(3,\) in the checkpoint and missing in the network'),
    'no stem ce': (lambda: state(18, ce_stem=False),
                   r': ce1\.\w+ is missing in the checkpoint and \(.+\) in the network'),
    'group size': (lambda: state(18, ce_cfg=dict(group_size=8)),
                   r'layer1\.0\.ce\.running_whitening is \(8, 8, 8\) in the checkpoint and '
                   r'\(4, 16, 16\) in the network\..* loads the file as it is'),
    'other blocks': (lambda: state(50, ce_blocks=[(0, 1, 2), (), (), ()]),
                     r'layer2\.0\.ce\.\w+ is missing in the checkpoint'),
    'classifier': (lambda: {**state(18), **classifier(2048)},
                   r'fc\.weight is \(10, 2048\) in the checkpoint and \(10, 512\) in the network'),
    'classifier without bias': (lambda: {**state(18), 'fc.weight': torch.zeros(10, 512)},
                                r'fc\.bias is missing in the checkpoint and \(10,\)'),
}


@pytest.fixture(scope='module')
def refused(tmp_path_factory):
    """Folder, content of SRC, and outcome of each command line; two run at a time."""
    folders, contents = [], []
    for _, make, _ in WRONG_FILES.values():
        contents.append(saved(make()))
        folders.append(tmp_path_factory.mktemp('refused'))
        (folders[-1] / 'src.pth').write_bytes(contents[-1])
        (folders[-1] / 'dst.pth').write_text('precious')

    def outcome(folder, case):
        arguments, _, _ = case
        return tool(TOOL.name, *arguments.split(), cwd=folder, check=False,
                    env=dict(OMP_NUM_THREADS='1'))

    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(outcome, folders, WRONG_FILES.values())
        return dict(zip(WRONG_FILES, zip(folders, contents, outcomes)))


class TestRefusals:

    @pytest.mark.parametrize('case', WRONG_FILES)
    def test_one_line_and_nothing_written(self, refused, case):
        _, _, message = WRONG_FILES[case]
        folder, content, result = refused[case]
        assert result.returncode == 1
        assert result.stderr.count('\n') == 1
        assert re.search(message, result.stderr), result.stderr
        assert not result.stdout
        assert {path.name for path in folder.iterdir()} == {'src.pth', 'dst.pth'}
        assert (folder / 'src.pth').read_bytes() == content
        assert (folder / 'dst.pth').read_text() == 'precious'

    @pytest.mark.parametrize('case', WRONG_ENTRIES)
    def test_first_entry_that_differs_is_named(self, convert, tmp_path, case):
        make, message = WRONG_ENTRIES[case]
        with pytest.raises(SystemExit, match=message) as stop:
            convert(make())
        assert '\n' not in str(stop.value)
        assert [path.name for path in tmp_path.iterdir()] == ['src.pth']

    def test_a_folder_is_no_file_to_write(self, convert, tmp_path):
        (tmp_path / 'dst.pth').mkdir()
        with pytest.raises(SystemExit, match=r'dst\.pth is a folder\. Give'):
            convert(state(18))

    def test_full_disk_leaves_nothing(self, ce18, tmp_path):
        torch.save(ce18.state_dict(), tmp_path / 'src.pth')
        (tmp_path / 'dst.pth').write_text('precious')
        result = run('bash', '-c', f'ulimit -f 20000; exec {sys.executable} {TOOL} src.pth dst.pth',
                     cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert re.fullmatch(r'cannot write dst\.pth \(.+\)\. Make sure .+\n', result.stderr)
        assert {path.name for path in tmp_path.iterdir()} == {'src.pth', 'dst.pth'}
        assert (tmp_path / 'dst.pth').read_text() == 'precious'


class TestPretrained:
    """`init_cfg` of CEResNet, on files that nothing has converted."""

    @pytest.fixture
    def authors(self, ce50, tmp_path):
        entries = {**released_entries(ce50), **classifier(256)}
        return released_file(entries, tmp_path / 'resnet50_ce.pth.tar')

    def test_authors_file(self, ce50, authors):
        loaded = pretrained(50, authors, ce_cfg=dict(freeze='all'), **SLIM)
        assert all(map(torch.equal, features(loaded), features(ce50)))

    def test_mmpretrain_classifier(self, ce50, tmp_path, log):
        entries = {**with_prefix('backbone.', ce50.state_dict()),
                   **with_prefix('head.', classifier(256))}
        torch.save(dict(meta=dict(epoch=100), state_dict=entries), tmp_path / 'epoch_100.pth')
        loaded = pretrained(50, tmp_path / 'epoch_100.pth', **SLIM)
        assert_same(loaded.state_dict(), ce50.state_dict())
        assert not log.records

    def test_plain_resnet_and_the_warning(self, tmp_path, log):
        entries = ResNet(50, **SLIM).state_dict()
        torch.save({**entries, **classifier(256)}, tmp_path / 'resnet50.pth')
        loaded = pretrained(50, tmp_path / 'resnet50.pth', **SLIM).state_dict()
        assert_same({key: loaded[key] for key in entries}, entries)
        assert any('the 14 of this network start at their initial values' in record.message
                   for record in log.records)

    @pytest.mark.parametrize(('options', 'message'), [
        (dict(ce_cfg=dict(group_size=4)),
         r'layer1\.0\.ce\.running_whitening is \(2, 16, 16\) in the checkpoint and \(8, 4, 4\) in'),
        (dict(ce_stem=False), r'ce1\.\w+ is \(.*\) in the checkpoint and missing in the network'),
        (dict(ce_blocks=[(0, 1, 2), (0, 1, 2, 3), (), ()]),
         r'layer3\.0\.ce\.\w+ is \(.*\) in the checkpoint and missing in the network'),
        (dict(ce_blocks=[(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, )]),
         r'layer4\.0\.ce\.\w+ is missing in the checkpoint and \(.*\) in the network'),
    ], ids=str)
    def test_other_ce_layers_are_refused(self, authors, options, message):
        with pytest.raises(CheckpointError, match=message):
            pretrained(50, authors, **options, **SLIM)

    @pytest.mark.parametrize(('theirs', 'ours'), [
        ('layer2.3.ce.x_weight', 'layer2.3.ce.lambda_logit'),
        ('ce1.AR.fc.0.weight', 'ce1.reweighting.0.weight')])
    def test_missing_ce_entry_is_refused(self, ce50, tmp_path, theirs, ours):
        released_file(without(theirs, released_entries(ce50)), tmp_path / 'incomplete.pth.tar')
        with pytest.raises(CheckpointError, match=f'{re.escape(ours)} is missing in the check'):
            pretrained(50, tmp_path / 'incomplete.pth.tar', **SLIM)
