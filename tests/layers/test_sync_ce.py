"""SyncCE on real processes: every rank computes what one process would on the whole batch."""
import contextlib
import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.sync_ranks import reference_step
from mmcv.cnn import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cenet_mmdet import CE, CEResNet, SyncCE
from cenet_mmdet.layers.fused import batch_norm_ce, can_fuse
from cenet_mmdet.layers.steps.all_reduce import all_reduce
from cenet_mmdet.layers.steps.moments import batch_moments
from cenet_mmdet.models.insert import NormCE

CHANNELS = 12
STEPS = 3
# For each rank (samples, height, width), an empty rank and unequal pixel counts included.
SPLITS = {
    'two equal': [(2, 4, 4), (2, 4, 4)],
    'two unequal': [(3, 5, 3), (1, 7, 9)],
    'three, one empty': [(2, 4, 6), (0, 4, 6), (3, 2, 5)],
    'four, one of single pixels': [(1, 3, 3), (2, 4, 2), (4, 1, 1), (1, 6, 6)],
}
OPTIONS = {'both': {}, 'BD alone': dict(bd_ratio=1.0), 'IR alone': dict(bd_ratio=0.0),
           'frozen F': dict(freeze='adaptive')}


def spawn(function, split, *arguments, tmp_path):
    """Run function(rank, shape, *arguments) in one process per rank, results by rank."""
    address = f'file://{tmp_path}/rendezvous'
    mp.spawn(_process, (address, function, split, arguments, str(tmp_path)), nprocs=len(split))
    return [torch.load(tmp_path / f'rank{rank}.pt', weights_only=True)
            for rank in range(len(split))]


def _process(rank, address, function, split, arguments, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=address, rank=rank, world_size=len(split),
                            timeout=datetime.timedelta(seconds=60))
    torch.save(function(rank, split, *arguments), f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()


def batches(split, step, dtype):
    """Input and output gradient of each rank, another offset for each."""
    generator = torch.Generator().manual_seed(step)
    result = []
    for rank, (n, height, width) in enumerate(split):
        x, grad = torch.randn(2, n, CHANNELS, height, width, generator=generator,
                              dtype=torch.float64)
        result.append(((x * (1 + rank) + rank).to(dtype), grad.to(dtype)))
    return result


def layer(cls, dtype, options):
    torch.manual_seed(0)
    return cls(CHANNELS, group_size=4, dtype=dtype, **options)


def train_rank(rank, split, dtype, options):
    """Outputs, gradients and buffers of one rank, and the number of collectives of a step."""
    ce = layer(SyncCE, dtype, options)
    with count_collectives() as calls:
        return train_steps(ce, rank, split, dtype, calls)


def train_steps(ce, rank, split, dtype, calls):
    outputs, gradients, counts = [], [], []
    for step in range(STEPS):
        x, grad = batches(split, step, dtype)[rank]
        x.requires_grad_()
        before = calls.copy()
        y = ce(x)
        forward = calls['n'] - before['n']
        y.backward(grad)
        counts.append([forward, calls['n'] - before['n'] - forward])
        outputs.append(y.detach())
        gradients.append(x.grad)
    return dict(outputs=outputs, gradients=gradients, counts=torch.tensor(counts),
                parameters={n: p.grad for n, p in ce.named_parameters() if p.grad is not None},
                buffers=dict(ce.named_buffers()))


@contextlib.contextmanager
def count_collectives():
    """Counts calls of all collectives there are."""
    calls = {'n': 0}
    names = ('all_reduce', 'all_gather', 'all_gather_into_tensor', 'broadcast', 'reduce',
             'reduce_scatter', 'gather', 'all_to_all', 'barrier')
    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():

        def counted(*args, original=original, **kwargs):
            calls['n'] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    yield calls
    for name, original in originals.items():
        setattr(dist, name, original)


def train_whole(split, dtype, options, norm=None):
    """The single-process layer on the union of the ranks' batches.

    Samples of different sizes do not fit into one tensor: the moments are
    taken from each and pooled by plain formulas, independent of the package's.
    """
    ce = layer(CE, dtype, options).double()  # float32's initial weights for float32
    outputs, gradients = [], []
    for step in range(STEPS):
        parts = batches(split, step, dtype)
        xs = [x.double().requires_grad_() for x, _ in parts]
        ys = reference_step(ce, xs if norm is None else reference_norm(norm, xs))
        torch.autograd.backward(ys, [grad.double() for _, grad in parts])
        outputs.append([y.detach() for y in ys])
        gradients.append([x.grad for x in xs])
    return (ce if norm is None else NormCE(norm, ce)), outputs, gradients


def reference_norm(norm, xs):
    """Batch norm over maps of any sizes, by itself over all their pixels in one row."""
    pixels = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
    rows = norm(pixels.T[:, :, None, None])[:, :, 0, 0].T
    parts = rows.split([x[:, 0].numel() for x in xs], 1)
    return [p.view(CHANNELS, len(x), *x.shape[2:]).transpose(0, 1) for p, x in zip(parts, xs)]


def train_rank_all(rank, split):
    """All options in one set of processes, whose start is what takes time."""
    results = {name: train_rank(rank, split, torch.float64, options)
               for name, options in OPTIONS.items()}
    return {**results, 'float32': train_rank(rank, split, torch.float32, {}),
            'bfloat16': half_precision(rank, split), 'behind': behind_batch_norm(rank, split),
            'SyncBN': train_behind_sync_batch_norm(rank, split)}


def train_behind_sync_batch_norm(rank, split):
    """SyncBN and SyncCE by one collective each way, which works on CPUs too."""
    both = NormCE(batch_norm(nn.SyncBatchNorm), layer(SyncCE, torch.float64, {}))
    x = batches(split, 0, torch.float64)[rank][0]
    assert can_fuse(both.norm, both.ce, x)
    assert not can_fuse(both.norm, layer(CE, torch.float64, {}), x)
    assert not can_fuse(both.norm, SyncCE(CHANNELS, process_group=dist.group.WORLD), x)
    with count_collectives() as calls:
        return train_steps(both, rank, split, torch.float64, calls)


def batch_norm(cls):
    norm = cls(CHANNELS, dtype=torch.float64)
    torch.manual_seed(1)
    nn.init.uniform_(norm.weight, 0.1, 2)
    nn.init.normal_(norm.bias)
    return norm


def behind_batch_norm(rank, split):
    """BN of this rank and SyncCE in one pass, against one after the other: the largest error."""
    norm, ce = nn.BatchNorm2d(CHANNELS, dtype=torch.float64), layer(SyncCE, torch.float64, {})
    apart = copy.deepcopy(norm), copy.deepcopy(ce)
    errors = []
    for step in range(STEPS):
        x, grad = batches(split, step, torch.float64)[rank]
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = batch_norm_ce(norm, ce, xs[0]), apart[1](apart[0](xs[1]))
        for y in ys:
            y.backward(grad)
        errors += [(ys[0] - ys[1]), (xs[0].grad - xs[1].grad)]
        errors += [a - b for a, b in zip(ce.buffers(), apart[1].buffers())]
        errors += [a.grad - b.grad for a, b in zip(norm.parameters(), apart[0].parameters())]
    return max(float(e.abs().max()) for e in errors if e.numel())


def half_precision(rank, split):
    """Under autocast: type of the output, buffers against those of the same input in float32."""
    x = batches(split, 0, torch.bfloat16)[rank][0]
    half, single = layer(SyncCE, torch.float32, {}), layer(SyncCE, torch.float32, {})
    with torch.autocast('cpu', torch.bfloat16):
        y = half(x)
    single(x.float())
    return dict(kept=y.dtype == x.dtype, error=max(
        float((a - b).abs().max()) for a, b in zip(half.buffers(), single.buffers())))


@pytest.mark.parametrize('split', SPLITS.values(), ids=SPLITS)
def test_ranks_together_are_one_process(split, tmp_path):
    """Several steps: outputs, gradients, summed parameter gradients and buffers."""
    ranks = spawn(train_rank_all, split, tmp_path=tmp_path)
    for name, options in OPTIONS.items():
        compare([r[name] for r in ranks], *train_whole(split, torch.float64, options), atol=1e-10)
    norm = batch_norm(nn.BatchNorm2d)
    compare([r['SyncBN'] for r in ranks], *train_whole(split, torch.float64, {}, norm), atol=1e-10)
    assert ranks[0]['float32']['outputs'][0].dtype == torch.float32
    compare([r['float32'] for r in ranks], *train_whole(split, torch.float32, {}), atol=1e-5)
    for r in ranks:
        assert r['bfloat16']['kept']
        assert r['bfloat16']['error'] < 1e-5
        assert r['behind'] < 1e-10


def compare(ranks, ce, outputs, gradients, atol):
    def close(ours, expected):
        # relative to the largest entry: sums over hundreds of pixels are not of order one
        bound = atol * max(1., float(expected.abs().max()) if expected.numel() else 1.)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=bound)

    for rank, result in enumerate(ranks):
        for step in range(STEPS):
            close(result['outputs'][step], outputs[step][rank])
            close(result['gradients'][step], gradients[step][rank])
        # exactly one collective each way
        assert result['counts'].tolist() == [[1, 1]] * STEPS
        for name, buffer in ce.named_buffers():
            close(result['buffers'][name], buffer.double())
            assert torch.equal(result['buffers'][name], ranks[0]['buffers'][name])
    for name, parameter in ce.named_parameters():
        if parameter.requires_grad:
            close(sum(result['parameters'][name].double() for result in ranks), parameter.grad)


def test_averaging_with_equal_weights_would_fail():
    """What a layer would compute that averages its ranks' covariances: far beyond tolerance."""
    split = SPLITS['two unequal']
    parts = [x.flatten(2).transpose(0, 1).flatten(1) for x, _ in batches(split, 0, torch.float64)]
    whole = torch.cov(torch.cat(parts, 1), correction=0)
    averaged = sum(torch.cov(part, correction=0) for part in parts) / 2
    assert (averaged - whole).norm() / whole.norm() > 0.1


def all_empty(rank, split):
    ce = layer(SyncCE, torch.float64, {})
    ce(torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64, generator=torch.Generator()))
    before = {n: b.clone() for n, b in ce.named_buffers()}
    x = torch.zeros(0, CHANNELS, 3, 3, dtype=torch.float64, requires_grad=True)
    ce(x).sum().backward()
    return dict(same=all(torch.equal(before[n], b) for n, b in ce.named_buffers()),
                zero=all(not p.grad.any() for p in ce.parameters()))


def test_all_ranks_empty_leaves_the_statistics(tmp_path):
    for result in spawn(all_empty, [None, None], tmp_path=tmp_path):
        assert result == dict(same=True, zero=True)


# mean and deviation of the channels of each case; the last has inhibited ones (gamma 1e-3,
# beta 0.3 after a batch norm) beside ordinary ones
OFFSETS = {**{f'mean/std {ratio}': [(ratio, 1)] * 8 for ratio in (1, 10, 100, 1000)},
           'inhibited': [(0.3, 1e-3)] * 4 + [(0.3, 1)] * 4}


def covariance_errors(rank, split):
    """Largest error of the synchronized float32 covariance, in units of the deviations."""
    torch.manual_seed(0)
    errors = []
    for offsets in OFFSETS.values():
        mean, std = torch.tensor(offsets, dtype=torch.float64).T.unsqueeze(-1)  # (8, 1) each
        parts = [(torch.randn(2, 1, 8, 400 + 100 * r, dtype=torch.float64) * std + mean).float()
                 for r in range(len(split))]
        mine = parts[rank]
        ours = all_reduce(batch_moments(mine)).covariance
        pixels = torch.cat([p.double().transpose(0, 2).flatten(1) for p in parts], 1)
        error = ours[0] - torch.cov(pixels, correction=0)
        errors.append((error / (std * std.T)).abs().max())
    return torch.stack(errors)


def test_covariance_keeps_its_digits_under_offsets(tmp_path):
    """From the first step on, and for inhibited channels: error below 1e-4 of a variance."""
    for errors in spawn(covariance_errors, [None, None], tmp_path=tmp_path):
        assert len(errors) == len(OFFSETS)
        assert (errors < 1e-4).all(), dict(zip(OFFSETS, errors.tolist()))


class TestOneProcess:

    def test_is_ce(self):
        x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
        sync, ce = layer(SyncCE, torch.float64, {}), layer(CE, torch.float64, {})
        assert torch.equal(sync(x), ce(x))
        assert all(torch.equal(a, b) for a, b in zip(sync.buffers(), ce.buffers()))

    def test_conversion_keeps_parameters_and_back(self):
        backbone = CEResNet(18, base_channels=8, stem_channels=8)
        state = {k: v.data_ptr() for k, v in backbone.state_dict().items()}
        sync = SyncCE.convert_sync_ce(backbone, process_group='group')
        kinds = {type(ce) for _, ce in sync.ce_layers()}
        assert kinds == {SyncCE}
        assert sync.ce1.process_group == 'group'
        assert {k: v.data_ptr() for k, v in sync.state_dict().items()} == state
        back = SyncCE.revert_sync_ce(sync)
        assert {type(ce) for _, ce in back.ce_layers()} == {CE}
        assert {k: v.data_ptr() for k, v in back.state_dict().items()} == state

    def test_a_single_layer_converts(self):
        sync = SyncCE.convert_sync_ce(CE(8))
        assert type(sync) is SyncCE
        assert type(SyncCE.revert_sync_ce(sync)) is CE

    def test_batch_norm_conversions_leave_it_alone(self):
        network = nn.Sequential(nn.BatchNorm2d(8), SyncCE(8), CE(8))
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert [type(m) for m in network] == [nn.SyncBatchNorm, SyncCE, CE]
        network = revert_sync_batchnorm(network)
        assert [type(m) for m in network][1:] == [SyncCE, CE]

    @pytest.mark.parametrize('options', [
        {}, dict(deep_stem=True), dict(ce_cfg=dict(type='SyncCE'), depth=50)], ids=str)
    def test_fuse_conv_bn_leaves_it_intact_and_correct(self, options):
        """Convolutions take up the batch norms, CE follows them as before."""
        torch.manual_seed(0)
        backbone = CEResNet(**{'depth': 18, **options}, base_channels=8, stem_channels=8)
        x = torch.randn(2, 3, 64, 64)
        backbone.train()
        for _ in range(2):  # statistics that are not the initial ones
            backbone(x)
        backbone.double().eval()
        expected = backbone(x.double())
        layers = dict(backbone.ce_layers())
        fused = fuse_conv_bn(backbone)
        assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
        assert dict(fused.ce_layers()) == layers
        for ours, theirs in zip(fused(x.double()), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
