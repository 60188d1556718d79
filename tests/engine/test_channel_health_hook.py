"""ChannelHealthHook in real runs, on a network whose channels are known."""
import contextlib
import json
import math
import os
import shutil
from collections import OrderedDict

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from cenet_mmdet import CE, CEResNet, ChannelHealthHook
from cenet_mmdet.analysis.collector import Collector, first_non_finite
from cenet_mmdet.analysis.figures import read_curves
from cenet_mmdet.analysis.modules import rectifiers
from cenet_mmdet.engine.channel_health_hook import measure_rectified
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel


def known_channels():
    """Of the first stage's 8 channels 6 are silent; the second stage has two equal channels."""
    norm, last = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    norm.weight.data[2:] = 0
    last.weight.data[:] = last.weight.data[0].abs()
    nn.init.ones_(last.bias)
    first = nn.Sequential(nn.Conv2d(3, 8, 1), norm, CE(8, freeze='adaptive'), nn.ReLU())
    return nn.Sequential(OrderedDict(layer1=first, layer2=nn.Sequential(last, nn.ReLU())))


class Model(BaseModel):

    def __init__(self, backbone=None, factor=0.):
        super().__init__()
        self.backbone, self.factor = backbone or known_channels(), factor

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
           cfg=dict(model_wrapper_cfg=dict(type=CPUDistributedDataParallel.__name__)),
           experiment_name=str(folder).replace('/', '_')).train()
    return records(folder), ''.join(log.read_text() for log in folder.glob('*/*.log'))


def records(folder):
    return [json.loads(line) for path in folder.glob('*/vis_data/scalars.json')
            for line in path.read_text().splitlines() if 'inhibited/' in line]


def test_logs_what_is_known_every_interval(tmp_path, tool_here):
    found, log = train(tmp_path, Model(), interval=3, alarm=0.7)
    assert [record['step'] for record in found] == [3, 6]
    for record in found:
        assert record['inhibited/layer1'] == 0.75 and record['inhibited/layer2'] == 0
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
    tool_here('plot_training.py', tmp_path, part.parent, '--out', 'curves.png', cwd=tmp_path)
    refused = tool_here('plot_training.py', tmp_path, part, '--out', 'no.png', cwd=tmp_path)
    assert f'{part} has no measurements of channels' in refused.stderr and refused.returncode == 1
    assert [path.name for path in tmp_path.glob('*.png')] == ['curves.png']


def test_networks_without_stages_are_logged_by_layer(tmp_path):
    vgg = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ELU(), nn.Conv2d(4, 2, 1), nn.ELU())
    (found, ), log = train(tmp_path, Model(vgg), interval=7, alarm=1)
    assert found['step'] == 7 and 'are inhibited' not in log
    assert {key for key in found if '/' in key} == {  # and there is no lambda
        'inhibited/1', 'inhibited/3', 'correlation/1', 'correlation/3'}


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
    """Gradients and statistics are those of any other step, to the bit, and measured exactly."""
    def step(collector=None, non_finite=None):
        torch.manual_seed(1)
        with collector or contextlib.nullcontext(), non_finite or contextlib.nullcontext():
            with torch.autocast('cpu', torch.bfloat16):
                outputs = model(torch.randn(2, 3, 32, 32))
            total(outputs).square().backward()
        assert outputs[0].dtype == torch.bfloat16
        return [*model.buffers(), *(p.grad for p in model.parameters())]

    model = slim_resnet()
    expected, model = step(), slim_resnet()
    measured = Collector(model, rectifiers(model), measure_rectified)
    assert all(map(torch.equal, step(measured, first_non_finite(model)), expected))
    assert measured.statistics()['relu'][0].dtype == torch.float32


def train_rank(rank, folder):
    os.environ['LOCAL_RANK'] = str(rank)  # MMEngine reads it
    train(folder, Model(), interval=3, launcher='pytorch')


def test_distributed_training_is_logged_by_the_main_process(ranks, tmp_path):
    ranks.run(train_rank, tmp_path)
    assert [(r['step'], r['inhibited/layer1']) for r in records(tmp_path)] == [(3, .75), (6, .75)]


def test_refusals_before_training_and_a_loss_that_is_not_finite_by_itself(tmp_path):
    with pytest.raises(ValueError, match='no rectifier module'):
        train(tmp_path / 'a', Model(nn.Conv2d(3, 4, 1)))
    for name, value in (('interval', 0), ('threshold', 0.), ('alarm', 2.)):
        with pytest.raises(ValueError, match=rf'alarm in \[0, 1\]; got .*\b{value!r}\b'):
            ChannelHealthHook(**{name: value})
    _, log = train(tmp_path / 'b', Model(factor=math.inf), interval=1, iterations=1)
    assert 'in iteration 1: the loss; the outputs of all modules are finite' in log
