"""SyncCE on three real processes, beyond what test_properties.py has of it; and its conversions."""
import copy

import pytest
import torch
import torch.distributed as dist
from helpers.layers import OFFSETS, covariance_error, random_input, same_state, state
from helpers.ranks import batches, new_layer, reference_step
from torch import nn

from cenet_mmdet import CE, SyncCE
from cenet_mmdet.layers.fused import batch_norm_ce, can_fuse
from cenet_mmdet.layers.steps.all_reduce import all_reduce
from cenet_mmdet.layers.steps.moments import batch_moments

CHANNELS = 12
# For each rank (samples, height, width): unequal pixel counts, an empty rank, single pixels.
SPLITS = {'equal': [(2, 4, 4)] * 3, 'unequal': [(3, 5, 3), (1, 7, 9), (2, 4, 2)],
          'one empty': [(2, 4, 6), (0, 4, 6), (3, 2, 5)],
          'one of single pixels': [(1, 3, 3), (4, 1, 1), (1, 6, 6)]}


def layer(cls, dtype=torch.float64, **options):
    return new_layer(cls, CHANNELS, dtype, group_size=4, **options)


def inputs(split, step=0, dtype=torch.float64):
    """The batch of each rank, with another scale and offset in each."""
    return [((rank + 1) * x).to(dtype) for rank, x in enumerate(batches(split, CHANNELS, step))]


def three_steps(rank, split, dtype, half):
    """Outputs and state of a rank in lower precision; under autocast if its input is `half`."""
    ce = layer(SyncCE, dtype)
    outputs = []
    for step in range(3):
        x = inputs(split, step, half or dtype)[rank]
        with torch.autocast('cpu', half or torch.bfloat16, enabled=half is not None):
            outputs.append(ce(x).detach())
    return outputs, ce.state_dict()


@pytest.mark.parametrize('split', SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(('half', 'error', 'state_error'), [
    (None, 1e-5, 1e-5), (torch.bfloat16, 0.1, 1e-5)], ids=['float32', 'bfloat16'])
def test_several_steps_in_single_and_half_precision(split, half, error, state_error, ranks):
    """Against plain formulas in float64; statistics are those of float32 in half precision too."""
    results = ranks.run(three_steps, split, torch.float32, half)
    whole = layer(CE, torch.float32).double()
    for step in range(3):
        xs = [x.double() for x in inputs(split, step, half or torch.float32)]
        for (outputs, _), expected in zip(results, reference_step(whole, xs)):
            assert outputs[step].dtype == (half or torch.float32)
            torch.testing.assert_close(outputs[step].double(), expected.detach(), rtol=error,
                                       atol=error)
    for _, entries in results:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(entries[name].double(), value.double(), rtol=state_error,
                                       atol=state_error)


def behind_batch_norm(rank, split):
    """BN of this rank and SyncCE in one pass, against one after the other: the largest error."""
    layers = nn.BatchNorm2d(CHANNELS, dtype=torch.float64), layer(SyncCE)
    apart = copy.deepcopy(layers)
    xs = [inputs(split)[rank].requires_grad_() for _ in range(2)]
    ys = batch_norm_ce(*layers, xs[0]), apart[1](apart[0](xs[1]))
    for y in ys:
        y.backward(y.detach())
    errors = [ys[0] - ys[1], xs[0].grad - xs[1].grad]
    for ours, theirs in zip(layers, apart):
        errors += [a - b for a, b in zip(ours.buffers(), theirs.buffers())]
        errors += [a.grad - b.grad for a, b in zip(ours.parameters(), theirs.parameters())]
    return max(float(error.abs().max()) for error in errors if error.numel())


@pytest.mark.parametrize('split', SPLITS.values(), ids=SPLITS)
def test_behind_a_batch_norm_of_each_rank(split, ranks):
    assert max(ranks.run(behind_batch_norm, split)) < 1e-10


def fused_with_sync_batch_norm(rank):
    """For CE of this rank, SyncCE of all, SyncCE of another group of ranks."""
    norm, x = nn.SyncBatchNorm(CHANNELS, dtype=torch.float64), random_input(2, CHANNELS, 4, 4)
    return [can_fuse(norm, ce, x) for ce in (
        layer(CE), layer(SyncCE), layer(SyncCE, process_group=dist.group.WORLD))]


def test_sync_batch_norm_is_fused_with_ce_of_the_same_ranks(ranks):
    assert ranks.run(fused_with_sync_batch_norm) == [[False, True, False]] * 3


def all_empty(rank):
    ce = layer(SyncCE)
    ce(random_input(2, CHANNELS, 3, 3))
    before = state(ce)
    ce(torch.zeros(0, CHANNELS, 3, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    return same_state(before, ce) and all(not p.grad.any() for p in ce.parameters())


def test_all_ranks_empty_leaves_the_statistics(ranks):
    assert ranks.run(all_empty) == [True] * 3


def covariance_errors(rank):
    errors = []
    for offsets in OFFSETS.values():
        mean, std = torch.tensor(offsets, dtype=torch.float64).T.unsqueeze(-1)  # (8, 1) each
        parts = [(random_input(2, 1, 8, 400 + 100 * r, seed=r) * std + mean).float()
                 for r in range(3)]
        covariance = all_reduce(batch_moments(parts[rank])).covariance
        errors.append(covariance_error(covariance, parts, std))
    return torch.stack(errors)


def test_covariance_keeps_its_digits_under_offsets(ranks):
    """From the first step on, and for inhibited channels: error below 1e-4 of a variance."""
    for errors in ranks.run(covariance_errors):
        assert len(errors) == len(OFFSETS)
        assert (errors < 1e-4).all(), dict(zip(OFFSETS, errors.tolist()))


class TestOneProcess:

    def test_is_ce(self):
        x = random_input(2, CHANNELS, 4, 4)
        sync, ce = layer(SyncCE), layer(CE)
        assert torch.equal(sync(x), ce(x))
        assert same_state(state(sync), ce)

    def test_conversion_keeps_parameters_and_back(self):
        network = nn.Sequential(CE(8), nn.Sequential(nn.ReLU(), CE(8, bd_ratio=1.)))
        before = {k: v.data_ptr() for k, v in network.state_dict().items()}
        sync = SyncCE.convert_sync_ce(network, process_group='group')
        assert type(sync[0]) is type(sync[1][1]) is SyncCE
        assert sync[0].process_group == 'group'
        assert {k: v.data_ptr() for k, v in sync.state_dict().items()} == before
        back = SyncCE.revert_sync_ce(sync)
        assert type(back[0]) is type(back[1][1]) is CE
        assert {k: v.data_ptr() for k, v in back.state_dict().items()} == before
        alone = SyncCE.convert_sync_ce(CE(8))
        assert type(alone) is SyncCE and type(SyncCE.revert_sync_ce(alone)) is CE
