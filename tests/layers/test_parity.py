"""The layer computes what the authors' released layer computes.

`data/ce_layer_reference.npz` holds the released layer's outputs, gradients and
buffers in float64, for two training steps and an evaluation of four layers.
"""
from pathlib import Path

import numpy as np
import pytest
import torch

from cenet_mmdet import CE
from cenet_mmdet.layers.released_keys import RELEASED_KEYS

REFERENCE = np.load(Path(__file__).parent.parent / 'data' / 'ce_layer_reference.npz')
TOLERANCE = dict(rtol=0, atol=1e-10)


def read(*path):
    return torch.from_numpy(np.array(REFERENCE['/'.join(path)]))


def entries(*path):
    """{released key: tensor} below a path of the file."""
    prefix = '/'.join(path) + '/'
    return {name[len(prefix):]: read(name) for name in REFERENCE.files if name.startswith(prefix)}


def released_buffers(ce):
    groups = ce.num_groups, ce.group_size, 1
    return {'running_mean': ce.running_mean.reshape(groups), 'running_wm': ce.running_whitening,
            'AR.running_scale': ce.running_scale}


@pytest.fixture(params=['g16', 'g64', 'halved', 'wide'])
def case(request):
    return request.param


@pytest.fixture
def ce(case):
    layer = CE(read(case, 'step1/x').shape[1], group_size=int(read(case, 'group_size')),
               dtype=torch.float64)
    # The released layer starts its running scale at 0, ours at 1.
    start = {**entries(case, 'param'), 'AR.running_scale': torch.zeros(1, dtype=torch.float64)}
    layer.load_state_dict(start, strict=False)
    return layer


def run(ce, case, step):
    x = read(case, step, 'x').requires_grad_()
    ce.zero_grad()
    y = ce(x)
    y.backward(read(case, step, 'grad_y'))
    torch.testing.assert_close(y, read(case, step, 'y'), **TOLERANCE)
    torch.testing.assert_close(x.grad, read(case, step, 'grad_x'), **TOLERANCE)


def test_two_training_steps_and_evaluation(ce, case):
    for step in ('step1', 'step2'):
        run(ce, case, step)
        gradients = {name: parameter.grad for name, parameter in ce.named_parameters()}
        for key, expected in entries(case, step, 'grad').items():
            torch.testing.assert_close(gradients.pop(RELEASED_KEYS[key]), expected, **TOLERANCE)
        assert not gradients, 'parameters that the released layer does not have'
        buffers = released_buffers(ce)
        for key, expected in entries(case, step, 'buffer').items():
            torch.testing.assert_close(buffers[key], expected, **TOLERANCE)
    ce.eval()
    run(ce, case, 'eval')


def test_released_state_dict_loads_strictly(ce, case):
    """All ten entries, below a prefix as in layer1.0.ce.x_weight; its statistics count as set."""
    state = {**entries(case, 'param'), **entries(case, 'step2', 'buffer')}
    fresh = CE(ce.in_channels, group_size=ce.group_size, dtype=torch.float64)
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(fresh))
    network.load_state_dict({f'1.0.{key}': value for key, value in state.items()})
    assert fresh.num_batches_tracked == 1
    fresh.eval()
    run(fresh, case, 'eval')
