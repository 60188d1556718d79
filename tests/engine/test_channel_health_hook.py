"""ChannelHealthHook in real runs, on a network whose channels are known."""
import contextlib
import json
import os
import socket

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from cenet_mmdet import CE, ChannelHealthHook
from cenet_mmdet.engine.channel_health_hook import _Rectified
from cenet_mmdet.engine.cpu_distributed import init_process_group


class Backbone(nn.Module):
    """Of the first stage's 8 channels 6 are silent; the second stage has two equal channels."""

    def __init__(self, ce=True):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8),
                                    CE(8, freeze='adaptive') if ce else nn.Identity(), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU())
        nn.init.zeros_(self.layer1[1].weight)
        nn.init.zeros_(self.layer1[1].bias)
        self.layer1[1].weight.data[:2] = 1
        self.layer2[0].weight.data[1] = self.layer2[0].weight.data[0].abs()
        self.layer2[0].weight.data[0] = self.layer2[0].weight.data[1]
        nn.init.ones_(self.layer2[0].bias)

    def forward(self, x):
        return self.layer2(self.layer1(x))


class Model(BaseModel):

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = Backbone(**kwargs)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=0 * self.backbone(inputs).sum())


def train(folder, model, iterations=7, launcher='none', check=True, **hook):
    """Scalars of the run's JSON log that are the hook's, and the text log."""
    images = [dict(inputs=torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)))
              for i in range(4)]
    runner = Runner(
        model, str(folder), dict(batch_size=2, num_workers=0, dataset=images,
                                 collate_fn=dict(type='default_collate'),
                                 sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.)),
        custom_hooks=[dict(type='ChannelHealthHook', **hook)],
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        launcher=launcher, env_cfg=dict(dist_cfg=dict(backend='gloo')),
        cfg=dict(model_wrapper_cfg=dict(type='CPUDistributedDataParallel')),
        experiment_name=f'health{id(folder)}')
    runner.train()
    if not check:
        return None
    path, = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    log, = folder.glob('*/*.log')
    return [line for line in lines if 'inhibited/layer1' in line], log.read_text()


def test_logs_what_is_known_every_interval(tmp_path):
    records, log = train(tmp_path, Model(), interval=3, alarm=0.7)
    assert [record['step'] for record in records] == [3, 6]
    for record in records:
        assert record['inhibited/layer1'] == 0.75
        assert record['inhibited/layer2'] == 0
        assert record['correlation/layer2'] == pytest.approx(1, abs=1e-3)
        assert record['lambda/layer1'] == 0.5
    assert log.count('75 % of the channels behind layer1.3 are inhibited') == 1


def test_networks_without_ce_have_no_lambda(tmp_path):
    records, log = train(tmp_path, Model(ce=False), interval=7, alarm=0.8)
    assert [record['step'] for record in records] == [7]
    assert not [key for key in records[0] if key.startswith('lambda')]
    assert 'are inhibited' not in log


def test_nothing_else_changes():
    """Gradients and statistics of a watched step are those of any other, to the bit."""
    results = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = Backbone()
        x = torch.randn(2, 3, 8, 8)
        with _Rectified(model) if watched else contextlib.nullcontext():
            model(x).square().sum().backward()
        results.append([*model.buffers(), *(p.grad for p in model.parameters()
                                            if p.requires_grad)])
    assert all(map(torch.equal, *results))


def test_mixed_precision():
    """Activations are bfloat16, what is measured of them is not."""
    model = Backbone()
    with _Rectified(model) as watching, torch.autocast('cpu', torch.bfloat16):
        assert model(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16
    layer = watching.result()['layer1.3']
    assert layer.magnitude.dtype == torch.float32
    assert (layer.magnitude > 0).tolist() == [True] * 2 + [False] * 6


def train_rank(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    init_process_group()  # as the tools do on CPUs
    train(folder, Model(), interval=3, launcher='pytorch', check=False)


def test_distributed_training_is_logged_by_the_main_process(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_rank, (tmp_path, port), nprocs=2)
    path, = tmp_path.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r['step'] for r in records if r.get('inhibited/layer1') == 0.75] == [3, 6]


def test_networks_without_rectifiers_are_refused_before_training(tmp_path):
    model = Model()
    model.backbone.layer1[3] = model.backbone.layer2[1] = nn.Identity()
    with pytest.raises(ValueError, match='no rectifier module'):
        train(tmp_path, model)


@pytest.mark.parametrize(('name', 'value'), [('interval', 0), ('threshold', 0.), ('alarm', 2.)])
def test_arguments_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f'{name} must be'):
        ChannelHealthHook(**{name: value})
