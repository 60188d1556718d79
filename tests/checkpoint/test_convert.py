"""Checkpoints of other origins: converted by the tool, loaded as they are, or refused by name."""
import io
import logging
import re
import resource

import numpy as np
import pytest
import torch
from helpers.networks import SLIM, images, released_entries, trained
from mmdet.models.backbones.resnet import ResNet
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cenet_mmdet import CEResNet
from cenet_mmdet.checkpoint.convert import CheckpointError, to_ours, to_released

TOOL = 'convert_checkpoint.py'


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


@torch.no_grad()
def features(backbone):
    backbone.eval()
    return backbone(images())


def pretrained(path, **options):
    backbone = CEResNet(50, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **options)
    backbone.init_weights()
    return backbone


@pytest.fixture(scope='module')
def ce18():
    return trained(CEResNet(18))


@pytest.fixture(scope='module')
def ce50():
    """A slim one."""
    return trained(CEResNet(50, **SLIM))


@pytest.fixture
def convert(tool_here, tmp_path):
    """What the tool says of a checkpoint, and the file that it wrote, as torch.load sees it."""
    def run_it(checkpoint):
        (tmp_path / 'src.pth').write_bytes(saved(checkpoint))
        (tmp_path / 'dst.pth').write_text('to be replaced')
        result = tool_here(TOOL, 'src.pth', 'dst.pth', cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout, torch.load('dst.pth', weights_only=True)
    return run_it


@pytest.mark.parametrize('options', [dict(depth=18), dict(depth=50),
                                     dict(depth=50, deep_stem=True)], ids=str)
def test_ours_to_released_and_back(options):
    backbone = trained(CEResNet(**options, **SLIM))
    released = to_released(backbone.state_dict())
    assert_same(released, released_entries(backbone))
    ours = to_ours(released)
    assert_same(ours, backbone.state_dict())
    assert_same(to_ours(ours), ours)


class TestConversion:

    def test_released_resnet_50_there_and_back(self, tool_here, tmp_path):
        """Same bits at the end, same features in between."""
        source = trained(CEResNet(50))
        entries = {**released_entries(source), **classifier(2048, 1000)}
        assert len(entries) == 432
        released_file(entries, tmp_path / 'resnet50_ce.pth.tar')

        out = tool_here(TOOL, 'resnet50_ce.pth.tar', 'ours.pth', cwd=tmp_path).stdout
        assert "recognised: authors' CE-ResNet, depth 50, classifier of 1000 classes" in out
        assert 'CE layers: 14' in out
        assert 'written: ours.pth, 446 entries' in out
        ours = torch.load(tmp_path / 'ours.pth', weights_only=True)
        note = ours['meta'].pop('note')
        assert 'CEResNet' in note
        assert ours['meta'] == dict(format_version=1, depth=50, ce_layers=14,
                                    source="authors' CE-ResNet", source_file='resnet50_ce.pth.tar')
        loaded = pretrained(tmp_path / 'ours.pth', ce_cfg=dict(freeze='all'))
        assert all(map(torch.equal, features(loaded), features(source)))

        tool_here(TOOL, 'ours.pth', 'back.pth.tar', '--to', 'released', cwd=tmp_path)
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
        authors = with_prefix('module.', released_entries(ce18))
        checkpoint, head, kind = {
            'backbone': (entries, {}, 'CE-ResNet'),
            'mmpretrain': (dict(meta=dict(epoch=1), state_dict=whole), head,
                           'mmpretrain classifier'),
            'detector': (dict(state_dict=detector), {},
                         'model with a backbone, such as a detector'),
            'parallel': (dict(state_dict=authors), {}, "authors' CE-ResNet"),
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
        expected = {key: value for key, value in ResNet(depth).state_dict().items()
                    if origin == 'mmpretrain' or not key.endswith('num_batches_tracked')}
        expected.update(classifier(512 if depth == 34 else 2048))
        kind, entries = 'ResNet without CE', expected
        if origin == 'mmpretrain':
            kind = 'mmpretrain classifier'
            entries = {f'{"head" if key.startswith("fc.") else "backbone"}.{key}': value
                       for key, value in expected.items()}
        out, ours = convert(dict(state_dict=entries))
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
            assert value.is_contiguous() and type(value) is torch.Tensor
            assert value.untyped_storage().nbytes() == value.nbytes


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


# What SRC holds (a checkpoint or bytes), what the message says, and another command line.
REFUSED = {
    'missing': (dict, r'checkpoint not found: nowhere\.pth\. Give', 'nowhere.pth dst.pth'),
    'no folder': (dict, r'folder not found: missing\. Create it', 'src.pth missing/dst.pth'),
    'same file': (dict, r'same file: src\.pth\. Give another path for DST', 'src.pth ./src.pth'),
    'folder': (dict, r'\.\. is a folder\. Give', 'src.pth ..'),
    'truncated': (lambda: saved(state(18))[:-3000],
                  r'src\.pth is damaged or was not written by torch\.save \(.+\)\. Get'),
    'wrong numbers': (damaged_numbers, r'src\.pth is damaged \(wrong checksum in .*\)\. Get'),
    'text': (lambda: b'<html>not found</html>', r'src\.pth is damaged or was not written by'),
    'no tensors': (lambda: dict(state_dict={}, meta=dict(epoch=3)),
                   r"src\.pth: it holds no tensors\. Expected is a state dict.*'state_dict'"),
    'no ce': (lambda: plain(18), r'no CE layers.*Leave out --to released',
              'src.pth dst.pth --to released'),
    'other network': (lambda: {'features.0.weight': torch.zeros(3)},
                      r'no ResNet of depth 18, 34, 50, 101, 152: it has no entry of a block'),
    'three stages': (lambda: {key: value for key, value in plain(50).items()
                              if not key.startswith('layer4')},
                     r'it has blocks of three convolutions, \(3, 4, 6\) per stage'),
    'width': (lambda: {**plain(18), 'layer4.1.conv2.weight': torch.zeros(512, 8, 3, 3)},
              r'layer4\.1\.conv2\.weight is \(512, 8, 3, 3\) in the checkpoint and '
              r'\(512, 512, 3, 3\) in the network'),
    'missing entry': (lambda: without('bn1.running_var', state(18)),
                      r'bn1\.running_var is missing in the checkpoint and \(64,\) in the network'),
    'one more': (lambda: {**state(18), 'attention.weight': torch.zeros(3)},
                 r'attention\.weight is \(3,\) in the checkpoint and missing in the network'),
    'no stem ce': (lambda: state(18, ce_stem=False),
                   r': ce1\.\w+ is missing in the checkpoint and \(.+\) in the network'),
    'group size': (lambda: state(18, ce_cfg=dict(group_size=8)),
                   r'layer1\.0\.ce\.running_whitening is \(8, 8, 8\) in the checkpoint and '
                   r'\(4, 16, 16\) in the network\..* loads the file as it is'),
    'classifier': (lambda: {**state(18), **classifier(2048)},
                   r'fc\.weight is \(10, 2048\) in the checkpoint and \(10, 512\) in the network'),
    'classifier without bias': (lambda: {**state(18), 'fc.weight': torch.zeros(10, 512)},
                                r'fc\.bias is missing in the checkpoint and \(10,\)'),
}


class TestRefusals:

    @pytest.mark.parametrize('case', REFUSED)
    def test_one_line_and_nothing_written(self, tool_here, tmp_path, case):
        make, message, *arguments = REFUSED[case]
        content = saved(make())
        (tmp_path / 'src.pth').write_bytes(content)
        (tmp_path / 'dst.pth').write_text('precious')
        result = tool_here(TOOL, *(arguments or ['src.pth dst.pth'])[0].split(), cwd=tmp_path)
        assert (result.returncode, result.stderr.count('\n'), result.stdout) == (1, 1, '')
        assert re.search(message, result.stderr), result.stderr
        assert {path.name for path in tmp_path.iterdir()} == {'src.pth', 'dst.pth'}
        assert (tmp_path / 'src.pth').read_bytes() == content
        assert (tmp_path / 'dst.pth').read_text() == 'precious'

    def test_full_disk_leaves_nothing(self, ce18, tool_here, tmp_path):
        torch.save(ce18.state_dict(), tmp_path / 'src.pth')
        (tmp_path / 'dst.pth').write_text('precious')
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**7, limits[1]))
        try:
            result = tool_here(TOOL, 'src.pth', 'dst.pth', cwd=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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
        loaded = pretrained(authors, ce_cfg=dict(freeze='all'), **SLIM)
        assert all(map(torch.equal, features(loaded), features(ce50)))

    def test_blocks_wrapped_to_be_recomputed(self, ce50):
        other = CEResNet(50, **SLIM)
        other.layer1[0] = checkpoint_wrapper(other.layer1[0])
        other.load_state_dict(ce50.state_dict())
        assert all(map(torch.equal, features(other), features(ce50)))

    def test_mmpretrain_classifier(self, ce50, tmp_path, log):
        entries = {**with_prefix('backbone.', ce50.state_dict()),
                   **with_prefix('head.', classifier(256))}
        torch.save(dict(meta=dict(epoch=100), state_dict=entries), tmp_path / 'epoch_100.pth')
        loaded = pretrained(tmp_path / 'epoch_100.pth', **SLIM)
        assert_same(loaded.state_dict(), ce50.state_dict())
        assert not [r for r in log.records if r.levelno >= logging.WARNING]

    def test_plain_resnet_and_the_warning(self, tmp_path, log):
        entries = ResNet(50, **SLIM).state_dict()
        torch.save({**entries, **classifier(256)}, tmp_path / 'resnet50.pth')
        loaded = pretrained(tmp_path / 'resnet50.pth', **SLIM).state_dict()
        assert_same({key: loaded[key] for key in entries}, entries)
        assert any('the 14 of this network start at their initial values' in record.message
                   for record in log.records)

    @pytest.mark.parametrize(('options', 'message'), [
        (dict(ce_cfg=dict(group_size=4)),
         r'layer1\.0\.ce\.running_whitening is \(2, 16, 16\) in the checkpoint and \(8, 4, 4\) in'),
        (dict(ce_stem=False), r'ce1\.\w+ is \(.*\) in the checkpoint and missing in the network'),
        (dict(ce_blocks=[(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, )]),
         r'layer4\.0\.ce\.\w+ is missing in the checkpoint and \(.*\) in the network'),
    ], ids=str)
    def test_other_ce_layers_are_refused(self, authors, options, message):
        with pytest.raises(CheckpointError, match=message):
            pretrained(authors, **options, **SLIM)

    @pytest.mark.parametrize(('theirs', 'ours'), [
        ('layer2.3.ce.x_weight', 'layer2.3.ce.lambda_logit'),
        ('ce1.AR.fc.0.weight', 'ce1.reweighting.0.weight')])
    def test_missing_ce_entry_is_refused(self, ce50, tmp_path, theirs, ours):
        released_file(without(theirs, released_entries(ce50)), tmp_path / 'incomplete.pth.tar')
        with pytest.raises(CheckpointError, match=f'{re.escape(ours)} is missing in the check'):
            pretrained(tmp_path / 'incomplete.pth.tar', **SLIM)
