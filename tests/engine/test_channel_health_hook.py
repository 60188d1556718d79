"""ChannelHealthHook in real runs, on a network whose channels are known."""
import contextlib
import json
import math
import os
import shutil
import socket

import pytest
import torch
from conftest import tool
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from cenet_mmdet import CE, CEResNet, ChannelHealthHook
from cenet_mmdet.analysis.collector import Collector
from cenet_mmdet.analysis.modules import rectifiers
from cenet_mmdet.analysis.nonfinite import FirstNonFinite
from cenet_mmdet.analysis.training_log import read_curves
from cenet_mmdet.engine.channel_health_hook import _Rectified
from cenet_mmdet.engine.cpu_distributed import process_group


class Backbone(nn.Module):
    """Of the first stage's 8 channels 6 are silent; the second stage has two equal channels."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8),
                                    CE(8, freeze='adaptive'), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU())
        nn.init.zeros_(self.layer1[1].weight)
        nn.init.zeros_(self.layer1[1].bias)
        self.layer1[1].weight.data[:2] = 1
        self.layer2[0].weight.data[:] = self.layer2[0].weight.data[0].abs()
        nn.init.ones_(self.layer2[0].bias)

    def forward(self, x):
        return self.layer2(self.layer1(x))


class Model(BaseModel):

    def __init__(self, backbone=None, factor=0.):
        super().__init__()
        self.backbone, self.factor = backbone or Backbone(), factor

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.factor * total(self.backbone(inputs)))


def total(outputs):
    return torch.cat([x.flatten() for x in outputs]).sum()


def train(folder, model, iterations=7, launcher='none', scale=1., **hook):
    """Records of the run's JSON log that are the hook's, and the text log."""
    images = [dict(inputs=scale * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)))
              for i in range(4)]
    Runner(model, str(folder), dict(batch_size=2, num_workers=0, dataset=images,
                                    collate_fn=dict(type='default_collate'),
                                    sampler=dict(type='DefaultSampler', shuffle=False)),
           train_cfg=dict(by_epoch=False, max_iters=iterations),
           optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.)),
           custom_hooks=[dict(type='ChannelHealthHook', **hook)],
           visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
           launcher=launcher, env_cfg=dict(dist_cfg=dict(backend='gloo')),
           cfg=dict(model_wrapper_cfg=dict(type='CPUDistributedDataParallel')),
           experiment_name=str(folder).replace('/', '_')).train()
    return records(folder), ''.join(log.read_text() for log in folder.glob('*/*.log'))


def records(folder):
    lines = [json.loads(line) for path in folder.glob('*/vis_data/scalars.json')
             for line in path.read_text().splitlines()]
    return [line for line in lines if any(key.startswith('inhibited/') for key in line)]


def test_logs_what_is_known_every_interval(tmp_path):
    found, log = train(tmp_path, Model(), interval=3, alarm=0.7)
    assert [record['step'] for record in found] == [3, 6]
    for record in found:
        assert record['inhibited/layer1'] == 0.75
        assert record['inhibited/layer2'] == 0
        assert record['correlation/layer2'] == pytest.approx(1, abs=1e-3)
        assert record['lambda/layer1'] == 0.5
    assert log.count('75 % of the channels behind layer1.3 are inhibited') == 1
    assert 'not finite' not in log
    # as a run that was resumed from its 4th iteration and is going on
    part, = tmp_path.glob('*/vis_data')
    resumed = shutil.copytree(part, tmp_path / '20990101_000000' / 'vis_data') / 'scalars.json'
    resumed.write_text('{"inhibited/layer1": 0.5, "step": 6}\n{"inhibited/layer1": 0')
    curves = read_curves(tmp_path)
    assert curves['inhibited']['layer1'] == [(3, 0.75), (6, 0.5)]
    assert curves['lambda'] == {'layer1': [(3, 0.5)]}
    tool('plot_training.py', tmp_path, part.parent, '--out', 'curves.png', cwd=tmp_path)
    refused = tool('plot_training.py', tmp_path, part, '--out', 'no.png', cwd=tmp_path, check=False)
    assert f'{part} has no measurements of channels' in refused.stderr
    assert [path.name for path in tmp_path.glob('*.png')] == ['curves.png']


def test_networks_without_stages_are_logged_by_layer(tmp_path):
    vgg = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ELU(), nn.Conv2d(4, 2, 1),
                        nn.ELU())
    (found, ), log = train(tmp_path, Model(vgg), interval=7, alarm=1)
    assert found['step'] == 7 and 'are inhibited' not in log
    assert {key for key in found if '/' in key} == {  # and there is no lambda
        'inhibited/2', 'inhibited/4', 'correlation/2', 'correlation/4'}


def slim_resnet(nan=None):
    """With NaN in one parameter."""
    torch.manual_seed(0)
    network = CEResNet(18, base_channels=8, stem_channels=8, ce_cfg=dict(group_size=4))
    network.init_weights()
    if nan:
        network.get_parameter(nan).data.fill_(math.nan)
    return network


@pytest.mark.parametrize(('nan', 'scale', 'module', 'advice'), [
    ('layer2.1.conv1.weight', 1, 'backbone.layer2.1.conv1 (Conv2d)', 'its input is finite'),
    ('layer1.0.bn1.bias', 1, 'backbone.layer1.0.bn1 (BatchNorm2d)', 'its input is finite'),
    # CE is computed in one with the norm in front of it
    ('layer3.0.ce.lambda_logit', 1, 'backbone.layer3.0.relu (ReLU)', 'its input has them too'),
    (None, math.inf, 'data_preprocessor (BaseDataPreprocessor)', 'check the images')])
def test_first_module_that_is_not_finite_is_named_once(nan, scale, module, advice, tmp_path):
    found, log = train(tmp_path, Model(slim_resnet(nan)), interval=1, iterations=2, scale=scale)
    line, = (line for line in log.splitlines() if 'not finite' in line)
    assert f'in iteration 1: {module} is the first module' in line and advice in line
    assert found == []


def test_nothing_else_changes():
    """Gradients and statistics of a watched step are those of any other, to the bit.

    Activations are bfloat16, and what is measured of them is not.
    """
    results = []
    for watched in (True, False):
        model = slim_resnet()
        watching = Collector(model, rectifiers(model), lambda _: _Rectified())
        with contextlib.ExitStack() as stack:
            if watched:
                stack.enter_context(watching)
                stack.enter_context(FirstNonFinite(model))
            with torch.autocast('cpu', torch.bfloat16):
                outputs = model(torch.randn(2, 3, 32, 32))
            total(outputs).square().backward()
        results.append([*model.buffers(), *(p.grad for p in model.parameters())])
        if watched:
            assert watching.statistics()['relu'].magnitude.dtype == torch.float32
    assert outputs[0].dtype == torch.bfloat16
    assert all(map(torch.equal, *results))


def train_rank(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with process_group(Config(dict(launcher='pytorch'))):
        train(folder, Model(), interval=3, launcher='pytorch')


def test_distributed_training_is_logged_by_the_main_process(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_rank, (tmp_path, port), nprocs=2)
    assert [(r['step'], r['inhibited/layer1']) for r in records(tmp_path)] == [(3, .75), (6, .75)]


def test_refusals_before_training_and_a_loss_that_is_not_finite_by_itself(tmp_path):
    with pytest.raises(ValueError, match='no rectifier module'):
        train(tmp_path / 'a', Model(nn.Conv2d(3, 4, 1)))
    for name, value in (('interval', 0), ('threshold', 0.), ('alarm', 2.)):
        with pytest.raises(ValueError, match=f'{name} must be'):
            ChannelHealthHook(**{name: value})
    _, log = train(tmp_path / 'b', Model(factor=math.inf), interval=1, iterations=1)
    assert 'in iteration 1: the loss; the outputs of all modules are finite' in log
