"""What has to hold on every device there is: on the CPU in each run, on GPUs by `make test-gpu`."""
import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import HALF, ROOT
from helpers.layers import random_input
from helpers.ranks import new_layer, reference_step
from torch import nn

from cenet_mmdet import CE, SyncCE
from cenet_mmdet.layers.fused import can_fuse, fused_batch_norm_ce
from cenet_mmdet.layers.reference import reference_ce
from cenet_mmdet.layers.released_keys import RELEASED_KEYS

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
GOLDEN = ROOT / 'tests/data/ce_layer_reference.npz'
BRANCHES = {'both': dict(momentum=0.25), 'BD alone': dict(bd_ratio=1.),
            'IR alone': dict(bd_ratio=0.), 'identity_start': dict(identity_start=True)}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def maps(*shape, dtype=torch.float64, seed=0):
    return 2 * random_input(*shape, seed=seed, dtype=dtype) + 1


def layer(device, cls=CE, dtype=torch.float64, **options):
    return new_layer(cls, 16, dtype, group_size=8, **options).to(device)


def close(ours, expected, error=1e-10):
    torch.testing.assert_close(ours, expected, rtol=error, atol=error)


@pytest.mark.parametrize('case', ['g16', 'g64', 'halved', 'wide'])
def test_parity_with_the_released_layer(device, case):
    """Outputs and gradients of a training step, to 1e-10."""
    golden = np.load(GOLDEN)

    def tensor(key):
        return torch.from_numpy(golden[f'{case}/{key}']).to(device)

    x, grad_y = tensor('step1/x').requires_grad_(), tensor('step1/grad_y')
    ce = CE(x.shape[1], group_size=int(golden[f'{case}/group_size']), dtype=torch.float64)
    parameters = {ours: tensor(f'param/{theirs}') for theirs, ours in RELEASED_KEYS.items()
                  if f'{case}/param/{theirs}' in golden}
    ce.load_state_dict(parameters, strict=False)
    y = ce.to(device)(x)
    y.backward(grad_y)
    close((y, x.grad), (tensor('step1/y'), tensor('step1/grad_x')))


@pytest.mark.parametrize('options', BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.filterwarnings('ignore:.*channels_last input is copied')
def test_layer_is_the_reference(device, options, memory_format):
    ce = layer(device, **options)
    reference = copy.deepcopy(ce).cpu()
    x = maps(3, 16, 6, 5)
    ours = ce(x.to(device).contiguous(memory_format=memory_format))
    expected, = reference_step(reference, [x])
    close((ours.cpu(), *(buffer.cpu() for buffer in ce.buffers())),
          (expected, *reference.buffers()))
    evaluated, _ = reference_ce(reference.eval(), [x])
    close(ce.eval()(x.to(device)).cpu(), evaluated[0])


def test_fused_pair_is_one_after_the_other(device):
    norm, ce = nn.BatchNorm2d(16, dtype=torch.float64).to(device), layer(device)
    nn.init.uniform_(norm.weight, 0.1, 2)
    apart = copy.deepcopy(norm), copy.deepcopy(ce)
    z = maps(3, 16, 6, 5).to(device).requires_grad_()
    other = z.detach().clone().requires_grad_()
    assert can_fuse(norm, ce, z)
    ours, expected = fused_batch_norm_ce(norm, ce, z), apart[1](apart[0](other))
    ours.square().sum().backward()
    expected.square().sum().backward()
    close(ours, expected)
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-10, atol=1e-9)
    close([*norm.buffers()], [*apart[0].buffers()])


@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_half_precision(device, dtype):
    """The input's type, float32 statistics, float32's values up to rounding."""
    norm, ce = nn.BatchNorm2d(16).to(device), layer(device, dtype=torch.float32)
    exact = copy.deepcopy(norm), copy.deepcopy(ce)
    z = maps(4, 16, 8, 8, dtype=torch.float32).to(device)
    with torch.autocast(device, dtype):
        out = fused_batch_norm_ce(norm, ce, z.to(dtype).requires_grad_())
    out.float().square().sum().backward()
    expected = exact[1](exact[0](z.to(dtype).float()))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.05)
    torch.testing.assert_close(ce.running_whitening, exact[1].running_whitening)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in ce.parameters())


def sync_rank(rank, count, device, folder):
    """One step of SyncCE on this rank's share of a batch."""
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo',
                            init_method=f'file://{folder}/rendezvous', rank=rank,
                            world_size=count)
    device = f'cuda:{rank}' if device == 'cuda' else device
    ce = layer(device, SyncCE)
    x = maps(2, 16, 4 + rank, 5, seed=rank).to(device).requires_grad_()
    y = ce(x)
    y.backward(y.detach())
    torch.save([y.detach().cpu(), x.grad.cpu(), ce.running_whitening.cpu()],
               f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_sync_ce_is_ce_on_the_whole_batch(device, tmp_path):
    """On two processes, or one for each GPU."""
    count = torch.cuda.device_count() if device == 'cuda' else 2
    mp.spawn(sync_rank, (count, device, str(tmp_path)), nprocs=count)
    reference = layer('cpu')
    xs = [maps(2, 16, 4 + rank, 5, seed=rank).requires_grad_() for rank in range(count)]
    ys = reference_step(reference, xs)
    torch.autograd.backward(ys, [y.detach() for y in ys])
    for rank, (x, y) in enumerate(zip(xs, ys)):
        close(torch.load(tmp_path / f'{rank}.pt', weights_only=True),
              [y.detach(), x.grad, reference.running_whitening], 1e-9)


def test_backbone_computes_the_same_everywhere(device):
    mmdet = pytest.importorskip('mmdet', reason='the backbones need MMDetection')  # noqa: F841
    from cenet_mmdet import CEResNet
    backbone = CEResNet(18, base_channels=8, stem_channels=8, frozen_stages=-1).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for place in ('cpu', device):
        network, image = copy.deepcopy(backbone).to(place), x.to(place).requires_grad_()
        outs = network(image)
        sum(out.square().mean() for out in outs).backward()
        results.append([image.grad.cpu(), *(out.detach().cpu() for out in outs)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('amp', [False, True])
def test_a_step_of_a_detector(device, amp):
    pytest.importorskip('mmdet', reason='needs MMDetection')
    if amp and device == 'cpu':
        pytest.skip("MMCV's operators on CPUs take float32 only")
    from mmdet.testing import demo_mm_inputs
    from mmengine.optim import AmpOptimWrapper, OptimWrapper

    from cenet_mmdet.models.build import build_model
    model = build_model(ROOT / 'configs/demo/mask_rcnn_ce_r18_shapes.py').to(device)
    data = demo_mm_inputs(2, image_shapes=[(3, 96, 96)] * 2, num_items=[3, 2], num_classes=5,
                          with_mask=True, device=device)
    wrapper = AmpOptimWrapper if amp else OptimWrapper
    optimizer = wrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    losses = model.train().train_step(data, optimizer)
    assert torch.isfinite(losses['loss'])
    assert all(b.isfinite().all() for b in model.buffers() if b.is_floating_point())
