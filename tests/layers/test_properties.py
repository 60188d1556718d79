"""What holds for every shape, type, layout and value that a layer may be fed.

`make test` tries each property on a few examples, the same ones each time; `make test-long`
on 1,500 others each.
"""
import copy
from typing import NamedTuple

import pytest
import torch
from conftest import HALF
from helpers.layers import random_input, same_state, state, strengthened
from helpers.ranks import Collectives, batches, new_layer, reference_norm, reference_step
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from cenet_mmdet import CE, DBN, IterNorm, SyncCE
from cenet_mmdet.layers.ce import FREEZE_MODES
from cenet_mmdet.layers.fused import batch_norm_ce, can_fuse
from cenet_mmdet.models.insert import NormCE

pytestmark = pytest.mark.filterwarnings('ignore:.*channels_last input is copied')

CHANNELS = st.sampled_from([1, 2, 3, 7, 8, 12, 16, 24, 31, 37])
RATIOS = st.sampled_from([None, 0., 0.4, 1.])
SCALES = (1e-6, 1e-3, 1., 1e2, 1e4)
OFFSETS = (0., 1., -30., 1e4)
LAYOUTS = ('contiguous', 'channels_last', 'transposed', 'sliced', 'one image repeated')
each_layer = pytest.mark.parametrize('cls', [CE, IterNorm, DBN])
needs_float16 = pytest.mark.skipif('float16' not in HALF,
                                   reason='torch 2.1 has no float16 products on CPUs')


class Case(NamedTuple):
    """A layer's options, and the recipe of its input."""
    shape: tuple
    options: dict
    training: bool
    kind: str
    scale: float
    offset: float
    seed: int

    def layer(self, dtype=torch.float32, cls=CE):
        """With running statistics that are those of some batch."""
        torch.manual_seed(self.seed)
        options = self.options if cls is CE else dict(group_size=self.options['group_size'])
        layer = strengthened(cls(self.shape[1], dtype=dtype, **options))
        if options.get('freeze') != 'all':
            layer(torch.randn(3, self.shape[1], 4, 4, dtype=dtype))
        return layer.train(self.training)

    def input(self, dtype=torch.float32):
        x = random_input(*self.shape, seed=self.seed)
        if self.kind == 'constant channels':
            x[:, ::2] = 0.5
        elif self.kind == 'nearly constant channels':
            x[:, ::2] = 0.5 + 1e-7 * x[:, ::2]
        elif self.kind == 'duplicated channels':
            x[:, 1:] = x[:, :1]
        elif self.kind == 'all zero':
            x.zero_()
        elif self.kind == 'one pixel stands out':
            x.flatten()[:1] *= 1e3
        return (x * self.scale + self.offset).to(dtype)


KINDS = ('random', 'constant channels', 'nearly constant channels', 'duplicated channels',
         'all zero', 'one pixel stands out')


@st.composite
def cases(draw, smallest=0, scales=SCALES, offsets=OFFSETS, kinds=KINDS,
          dimensions=(0, 1, 2, 2, 2, 3)):
    """Shapes with N, H, W from `smallest` up, and all options."""
    sizes = st.integers(smallest, 5)
    spatial = draw(st.sampled_from(dimensions))
    shape = (draw(sizes), draw(CHANNELS), *(draw(sizes) for _ in range(spatial)))
    options = dict(group_size=draw(st.none() | st.integers(1, 40)), bd_ratio=draw(RATIOS),
                   freeze=draw(st.sampled_from(FREEZE_MODES)), identity_start=draw(st.booleans()),
                   num_iters=draw(st.integers(1, 5)))
    return Case(shape, options, draw(st.booleans()), draw(st.sampled_from(kinds)),
                draw(st.sampled_from(scales)), draw(st.sampled_from(offsets)),
                draw(st.integers(0, 999)))


def close(ours, expected, digits=1e-9, smallest=1e-30):
    """Relative to the largest value, or `smallest`: sums are not of order one."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.
    torch.testing.assert_close(ours, expected, rtol=0, atol=digits * max(largest, smallest))


def close_states(ours, expected, digits=1e-9):
    assert ours.keys() == expected.keys()
    for name in ours:
        close(ours[name].double(), expected[name].double(), digits)


@each_layer
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64, *HALF.values()]))
def test_finite_in_finite_out(cls, case, dtype):
    """Output of the input's shape and type, gradients and statistics, all finite."""
    layer = case.layer(torch.float64 if dtype == torch.float64 else torch.float32, cls)
    x = case.input(dtype).requires_grad_()
    assume(cls is CE or x.numel() != x.shape[1])  # one value per channel is refused
    exact, before = copy.deepcopy(layer).double()(x.detach().double()), state(layer)
    y = layer(x)
    assume(exact.abs().max() < torch.finfo(dtype).max if exact.numel() else True)
    y.double().sum().backward()
    assert (y.shape, y.dtype, x.grad.dtype) == (x.shape, dtype, dtype)
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(t.isfinite().all() for t in (y, x.grad, *gradients, *state(layer).values()))
    assert x.numel() or same_state(before, layer)


@needs_float16
@given(cases(), st.sampled_from([0.5, 0.9, 0.999]), st.booleans())
def test_half_precision_at_the_edge_of_overflow(case, share, behind_norm):
    """Finite wherever float64's result can be represented in float16, behind a norm too."""
    x, limit = case.input(torch.float64), torch.finfo(torch.float16).max
    assume(x.any())
    x = (x / x.abs().max() * share * limit).half()
    ce = case.layer()
    exact = copy.deepcopy(ce).double()
    if behind_norm:
        norm = nn.BatchNorm2d(case.shape[1]).train(case.training)
        x = x.reshape(*x.shape[:2], -1, 1)
        assume(x.numel() > norm.num_features)
        y, expected = batch_norm_ce(norm, ce, x), exact(copy.deepcopy(norm).double()(x.double()))
    else:
        y, expected = ce(x), exact(x.double())
    assert y.isfinite()[expected.abs() < 0.98 * limit].all()
    assert all(value.isfinite().all() for value in state(ce).values())


@needs_float16
class TestFloat16:

    @pytest.mark.parametrize('bd_ratio', [None, 0., 1.])
    def test_gradients_that_are_sums_over_pixels_do_not_overflow(self, bd_ratio):
        """4,096 pixels of about 100: their sum is far beyond 65504."""
        ce = new_layer(CE, 8, torch.float32, bd_ratio=bd_ratio)
        x = (random_input(1, 8, 64, 64) + 100).half()
        exact, images = copy.deepcopy(ce).double(), x.double().requires_grad_()
        ce(x.requires_grad_()).double().sum().backward()
        exact(images).sum().backward()
        for ours, theirs in zip((x, *ce.parameters()), (images, *exact.parameters())):
            close(ours.grad.double(), theirs.grad, 0.02)

    @pytest.mark.parametrize('training', [True, False])
    def test_a_channel_that_hardly_varies_about_a_large_mean(self, training):
        """Behind a norm, where it is divided by next to nothing."""
        norm, ce = nn.BatchNorm2d(4), new_layer(CE, 4, torch.float32)
        z = random_input(2, 4, 6, 6)
        z[:, :2] = 3e4
        z[0, 1, 0, 0] += 16
        z = z.half()
        norm.running_mean[:2] = 3e4
        both = nn.ModuleList([norm, ce]).train(training)
        exact = copy.deepcopy(both).double()
        torch.testing.assert_close(batch_norm_ce(norm, ce, z).double(),
                                   exact[1](exact[0](z.double())), rtol=0.01, atol=0.01)


@given(cases(scales=[1., 1e2], offsets=[0., 30.], kinds=['random', 'duplicated channels']))
def test_float32_has_the_digits_of_float64(case):
    assume(case.shape[1] >= 8)  # else F's LayerNorm is over one value: rounding, magnified
    ce = case.layer()
    exact, x = copy.deepcopy(ce).double(), case.input()
    close(ce(x).double(), exact(x.double()), 2e-3)


@each_layer
@given(case=cases(smallest=2, dimensions=(2, )), layout=st.sampled_from(LAYOUTS))
def test_layout_does_not_matter(cls, case, layout):
    x = case.input(torch.float64)
    if layout == 'one image repeated':
        x = x[:1].expand(case.shape)
    other = {'contiguous': x.contiguous,
             'channels_last': lambda: x.contiguous(memory_format=torch.channels_last),
             'transposed': lambda: x.mT.contiguous().mT,
             'sliced': lambda: torch.cat([x, x], -1)[..., :x.shape[-1]],
             'one image repeated': lambda: x}[layout]()
    ours, theirs = (case.layer(torch.float64, cls) for _ in range(2))
    close(ours(other), theirs(x.contiguous()), 1e-12)
    close_states(state(ours), state(theirs), 1e-12)


@each_layer
@given(case=cases(smallest=2, dimensions=(2, 3)))
def test_pixels_are_pixels_however_they_lie(cls, case):
    ours, theirs = (case.layer(torch.float64, cls) for _ in range(2))
    x = case.input(torch.float64)
    close(ours(x).flatten(2), theirs(x.flatten(2)), 1e-12)


@each_layer
@given(case=cases(smallest=1))
def test_evaluation_does_not_mix_samples(cls, case):
    layer, x = case.layer(torch.float64, cls).eval(), case.input(torch.float64)
    before = state(layer)
    together = layer(x)
    for n in range(len(x)):
        close(together[n:n + 1], layer(x[n:n + 1]), 1e-12)
    assert same_state(before, layer)


@given(cases(smallest=1))
def test_groups_are_whitened_by_themselves(case):
    """BD on a group's channels alone gives what BD on all channels gives them."""
    case = case._replace(options={**case.options, 'bd_ratio': 1., 'freeze': 'none'})
    whole, x = case.layer(torch.float64).train(), case.input(torch.float64)
    part = new_layer(CE, whole.group_size, **{**case.options, 'group_size': None})
    chosen = slice(-whole.group_size, None)
    close(part(x[:, chosen]), whole(x)[:, chosen])


def batch_norm_and_ce(channels, **options):
    # IR alone is not fused, and torch's batch norm keeps what it saw
    options['bd_ratio'] = options['bd_ratio'] or 0.4
    both = NormCE(nn.BatchNorm2d(channels, dtype=torch.float64),
                  new_layer(CE, channels, **options))
    assert can_fuse(both.norm, both.ce, torch.ones(2, channels, 2, 2))
    return both


TRACKING = {
    'CE': lambda channels, **options: new_layer(CE, channels, **options),
    'BN + CE': batch_norm_and_ce,
    'IterNorm': lambda channels, group_size, **_: IterNorm(channels, group_size).double(),
    'DBN': lambda channels, group_size, **_: DBN(channels, group_size).double()}


@pytest.mark.parametrize('build', TRACKING.values(), ids=TRACKING)
@given(case=cases(smallest=2, dimensions=(2, )), data=st.data(),
       value=st.sampled_from([float('nan'), float('inf'), -float('inf')]))
def test_a_batch_that_is_not_finite_leaves_no_trace(build, case, value, data):
    """The running averages stay, and the next batch trains as if it had not been there."""
    x = case.input(torch.float64)
    spoilt = x.clone()
    spoilt.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
    torch.manual_seed(case.seed)
    layer = build(x.shape[1], **{**case.options, 'freeze': 'none'})
    untouched = copy.deepcopy(layer)
    before = state(layer)
    assert not layer(spoilt).isfinite().all()
    assert same_state(before, layer)
    assert torch.equal(layer(x), untouched(x))
    assert same_state(state(untouched), layer)


@each_layer
@given(case=cases(smallest=2))
def test_a_state_dict_is_all_there_is(cls, case):
    """A new layer with the state of another one, loaded strictly, computes the same."""
    trained, x = case.layer(torch.float64, cls), case.input(torch.float64)
    trained(x)
    fresh = case._replace(seed=1000).layer(torch.float64, cls)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(x), trained.eval()(x))


@given(cases())
def test_freezing_is_what_it_says(case):
    """'all' moves no statistics, 'adaptive' and 'all' nothing that learns but the strength."""
    ce, x = case.layer(torch.float64).train(), case.input(torch.float64)
    before = state(ce)
    y = ce(x)
    moved = {name for name, value in state(ce).items() if not torch.equal(before[name], value)}
    tracks = ce.freeze != 'all' and x.numel() > 0
    assert ('0.num_batches_tracked' in moved) is bool(moved) is tracks
    for name, parameter in ce.named_parameters():
        frozen = ('adaptive', 'all') if name != 'strength' else ('all', )
        assert parameter.requires_grad is (ce.freeze not in frozen)
    if ce.freeze == 'all':
        assert torch.equal(y, ce.eval()(x))


@st.composite
def splits(draw):
    """Channels, options, and each rank's (samples, height, width), of which some are empty."""
    options = dict(group_size=draw(st.none() | st.integers(1, 16)), bd_ratio=draw(RATIOS),
                   freeze=draw(st.sampled_from(['none', 'adaptive'])),
                   identity_start=draw(st.booleans()))
    shapes = [(draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5)))
              for _ in range(3)]
    assume(any(n > 0 and h * w > 1 for n, h, w in shapes))  # else there is no variance
    channels, seed = draw(CHANNELS), draw(st.integers(0, 999))
    return (shapes, channels, seed, draw(st.sampled_from([1e-3, 1., 1e2]))), options


def sync_batch_norm(cls, channels):
    norm = new_layer(cls, channels)
    nn.init.uniform_(norm.weight, 0.1, 2)
    nn.init.normal_(norm.bias)
    return norm


def step_of_rank(rank, inputs, options, behind_norm, spoilt):
    """Output, gradients of half its squared norm, state, and the number of collectives."""
    x = batches(*inputs)[rank]
    layer = new_layer(SyncCE, x.shape[1], **options)
    if behind_norm:
        layer = NormCE(sync_batch_norm(nn.SyncBatchNorm, x.shape[1]), layer)
    if spoilt is not None:
        before = x.clone()
        if rank == spoilt:
            before[0, 0, 0, 0] = float('nan')
        layer(before)
    x.requires_grad_()
    with Collectives() as forward:
        y = layer(x)
    with Collectives() as backward:
        y.backward(y.detach())
    counts = forward.count, backward.count
    return y.detach(), x.grad, layer.state_dict(), gradients_of(layer), counts


def gradients_of(layer):
    gradients = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
    return torch.cat(gradients) if gradients else torch.empty(0, dtype=torch.float64)


@given(split=splits(), behind_norm=st.booleans(), spoil=st.booleans())
def test_splitting_a_batch_over_ranks_changes_nothing(ranks, split, behind_norm, spoil):
    """Three real processes: outputs, gradients and state of one process on the whole batch.

    SyncBN and SyncCE by one collective each way work on CPUs too. A batch with a NaN on one rank,
    before, leaves no trace on any of them.
    """
    inputs, options = split
    parts = [x.requires_grad_() for x in batches(*inputs)]
    behind_norm = behind_norm and options['bd_ratio'] != 0  # else SyncBN is by itself
    spoilt = next(rank for rank, x in enumerate(parts) if len(x)) if spoil else None
    results = ranks.run(step_of_rank, inputs, options, behind_norm, spoilt)
    channels = parts[0].shape[1]
    whole, features = new_layer(CE, channels, **options), parts
    if behind_norm:
        norm = sync_batch_norm(nn.BatchNorm2d, channels)
        features, both = reference_norm(norm, parts), NormCE(norm, whole)
    outputs = reference_step(whole, features)
    torch.autograd.backward(outputs, [y.detach() for y in outputs])
    whole = both if behind_norm else whole
    for (output, gradient, entries, _, counts), expected, x in zip(results, outputs, parts):
        assert counts == (1, 1)
        close(output, expected.detach())
        # Terms of the output's size may cancel in the gradient, all but their rounding.
        rounding = 1e-16 * float(expected.detach().abs().max()) if len(x) else 0.
        close(gradient, x.grad, 1e-8, smallest=max(1e8 * rounding, 1e-30))
        close_states(entries, whole.state_dict())
        assert all(torch.equal(value, results[0][2][name]) for name, value in entries.items())
    close(sum(result[3] for result in results), gradients_of(whole), 1e-8)
