"""CE under what MMEngine and torch do to models: averages, recomputation, sharding, compilers."""
import functools
import re
from contextlib import nullcontext

import pytest
import torch
from helpers.ranks import Ranks
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.runner import FlexibleRunner, Runner, load_checkpoint
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader

from cenet_mmdet import CE, CEResNet, SyncCE
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel
from cenet_mmdet.models.backbones.ce_resnet import CEBasicBlock
from cenet_mmdet.models.insert import NormCE

STEPS = 3
FSDP_ON_CPU = pytest.mark.skipif(not hasattr(fsdp, 'fully_shard'),
                                 reason='sharding on CPUs needs torch 2.6')


class Model(BaseModel):
    """Three stages of a slim CE-ResNet in MMEngine's interface; the loss is its features' power."""

    def __init__(self, depth=18, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = CEResNet(
            depth, base_channels=16, stem_channels=16, num_stages=3, strides=(1, 2, 2),
            dilations=(1, 1, 1), out_indices=(0, 1, 2), norm_eval=False, **kwargs)
        self.backbone.init_weights()

    def init_weights(self):
        """Leave the weights as they are, so that all runs start from the same ones."""

    def forward(self, inputs, mode='tensor'):
        features = self.backbone(inputs)
        return dict(loss=power(features)) if mode == 'loss' else features


def power(features):
    return sum(feature.square().mean() for feature in features)


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


BATCHES = DataLoader(images(2 * STEPS), batch_size=2,
                     collate_fn=lambda samples: dict(inputs=torch.stack(samples)))


def train(work_dir, runner=Runner, **options):
    """The runner after an epoch of three steps, one on each of the batches."""
    runner = runner(Model(), work_dir=str(work_dir), experiment_name=work_dir.name, **{
        'train_dataloader': BATCHES, 'train_cfg': dict(by_epoch=True, max_epochs=1),
        'optim_wrapper': dict(optimizer=dict(type='SGD', lr=1e-3)), 'randomness': dict(seed=0),
        **options})
    runner.train()
    return runner


def weights(model):
    """Parameters and statistics, without the names of wrappers."""
    return {name.replace('module.', ''): value.detach().clone()
            for name, value in model.state_dict().items()}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Weights after the three steps in which nothing is added."""
    return weights(train(tmp_path_factory.mktemp('plain')).model)


def ce_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, CE)}


class TestAverages:

    @pytest.mark.parametrize('update_buffers', [False, True])
    def test_ema(self, update_buffers, tmp_path, plain):
        """Averaged statistics can be used, frozen too, and a run resumes from them."""
        hook = dict(type='EMAHook', momentum=0.3, update_buffers=update_buffers)
        train(tmp_path, custom_hooks=[hook])
        saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
        averaged, source = saved['state_dict'], saved['ema_state_dict']  # MMEngine swaps the two
        assert set(source) == {'steps', *(f'module.{name}' for name in plain)}
        assert all(torch.equal(source[f'module.{name}'], value) for name, value in plain.items())

        layer = 'backbone.layer1.0.ce.'
        assert not torch.equal(averaged[layer + 'lambda_logit'], plain[layer + 'lambda_logit'])
        for name in ('running_whitening', 'running_scale'):
            same = torch.equal(averaged[layer + name], plain[layer + name])
            assert same is not update_buffers
        # an integer cannot be averaged: the first step's is kept, which says "trained" still
        assert averaged[layer + 'num_batches_tracked'] == (1 if update_buffers else STEPS)

        frozen = Model(ce_cfg=dict(freeze='all')).eval()
        frozen.load_state_dict(averaged, strict=True)
        assert all(torch.isfinite(feature).all() for feature in frozen(images()))

        longer = train(tmp_path, custom_hooks=[hook], resume=True,
                       train_cfg=dict(by_epoch=True, max_epochs=2))
        for name, layer in ce_layers(longer.model).items():
            assert int(layer.num_batches_tracked) == 2 * STEPS, name


class TestRecomputation:
    """Of activations in the backward pass, by with_cp or torch's and MMEngine's machinery."""

    def assert_same_gradients(self, model):
        expected = Model(depth=model.backbone.depth)
        for each in (model, expected):
            power(each.double()(images().double())).backward()
        gradients = {name.replace('_checkpoint_wrapped_module.', ''): p.grad
                     for name, p in model.named_parameters()}
        for name, p in expected.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, msg=name)

    @pytest.mark.parametrize('depth', [18, 50])
    def test_with_cp(self, depth):
        """Blocks run twice, and statistics are tracked twice: CE's as often as batch norm's."""
        model = Model(depth=depth, with_cp=True)
        self.assert_same_gradients(model)
        for name, block in model.backbone.layer2.named_children():
            norm = getattr(block, block.ce_norm.replace('norm', 'bn'))
            assert int(block.ce.num_batches_tracked) == int(norm.num_batches_tracked) == 2, name
        assert int(model.backbone.ce1.num_batches_tracked) == 1

    @pytest.mark.parametrize('kind', [CEBasicBlock, CE, nn.BatchNorm2d])
    def test_wrapped_modules(self, kind):
        """Whatever is wrapped is called through its wrapper, and so recomputed."""
        model = Model()
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
        self.assert_same_gradients(model)
        wrapped = [m for m in model.modules() if isinstance(m, CheckpointWrapper)]
        assert len(wrapped) == {CEBasicBlock: 6, CE: 7, nn.BatchNorm2d: 15}[kind]
        for wrapper in wrapped:
            inner = wrapper._checkpoint_wrapped_module
            inner = getattr(inner, 'ce', inner)
            assert int(inner.num_batches_tracked) == 2

    @pytest.mark.parametrize('module', ['layer2.0', 'layer2.0.ce', 'layer2.0.bn2'])
    def test_mmengines_option(self, module, tmp_path, plain):
        name = f'backbone.{module}'
        cfg = Config(dict(activation_checkpointing=[name]))
        model = train(tmp_path, cfg=cfg).model
        layer = model.get_submodule(name)
        assert int(getattr(layer, 'ce', layer).num_batches_tracked) == 2 * STEPS
        for name, value in plain.items():
            if 'running' not in name and 'tracked' not in name:
                torch.testing.assert_close(model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize('layer', ['norm', 'ce'])
def test_backward_hooks_are_called(layer):
    """BN and CE computed in one would leave out what somebody looks at between the two."""
    block, seen = NormCE(nn.BatchNorm2d(8), CE(8)), []
    block.get_submodule(layer).register_full_backward_hook(lambda *args: seen.append(layer))
    block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert seen == [layer]


class TestOptimizer:

    def test_accumulated_gradients(self, tmp_path):
        """A step with the mean gradient of two batches; each batch is tracked."""
        ours = train(tmp_path, optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=1e-3), accumulative_counts=3,
            clip_grad=dict(max_norm=0.1))).model
        model = Model().train()
        for batch in BATCHES:
            (power(model(**batch)) / STEPS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for name, p in model.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), p.detach() - 1e-3 * p.grad)
        assert all(ce.num_batches_tracked == STEPS for ce in ce_layers(ours).values())

    @pytest.mark.parametrize('cfg, expected', [
        (dict(norm_decay_mult=0.), {'norm weight': (1, 0), 'norm bias': (1, 0)}),
        # MMEngine takes a norm's bias for a bias in its decay, not in its rate
        (dict(bias_decay_mult=0., bias_lr_mult=2.), {'norm bias': (1, 0)}),
        (dict(flat_decay_mult=0.),
         {'lambda': (1, 0), 'norm weight': (1, 0), 'norm bias': (1, 0)}),
        # `.ce` is in `layer1.0.ce.` and `ce1.`, and in no `centerness` or `reference_points`
        (dict(custom_keys={'.ce': dict(lr_mult=0.5, decay_mult=0.)}),
         dict.fromkeys(('lambda', 'norm weight', 'norm bias', 'linear 1', 'linear 2'), (0.5, 0))),
        (dict(custom_keys={'lambda_logit': dict(decay_mult=0.)}), {'lambda': (1, 0)}),
    ], ids=['norm', 'bias', 'flat', 'ce', 'lambda'])
    def test_groups(self, cfg, expected):
        """Factors of learning rate and weight decay that paramwise_cfg gives to CE."""
        model = Model()
        optimizer = build_optim_wrapper(model, dict(
            optimizer=dict(type='AdamW', lr=1., weight_decay=1.), paramwise_cfg=cfg)).optimizer
        factors = {id(p): (group['lr'], group['weight_decay'])
                   for group in optimizer.param_groups for p in group['params']}
        for ce in ce_layers(model).values():
            linear, norm, _, other_linear, _ = ce.reweighting
            parameters = {'lambda': ce.lambda_logit, 'linear 1': linear.weight,
                          'norm weight': norm.weight, 'norm bias': norm.bias,
                          'linear 2': other_linear.weight}
            for name, parameter in parameters.items():
                assert factors[id(parameter)] == expected.get(name, (1, 1)), name


@pytest.mark.long
def test_compiled_training(tmp_path, plain):
    """cfg.compile: MMEngine compiles the whole training step."""
    model = train(tmp_path, cfg=Config(dict(compile=dict(backend='aot_eager')))).model
    assert_same(weights(model), plain)


class TestStrategies:
    """MMEngine's FlexibleRunner. On CPUs each strategy has to be told not to ask for a GPU."""

    @pytest.mark.parametrize('strategy', [
        dict(type='DDPStrategy', model_wrapper=dict(type='CPUDistributedDataParallel')),
        pytest.param(dict(type='FSDPStrategy', state_dict_cfg='full', model_wrapper=dict(
            type='MMFullyShardedDataParallel', device_id=torch.device('cpu'))), marks=FSDP_ON_CPU),
    ], ids=['ddp', 'fsdp'])
    def test_same_training(self, strategy, process_group, tmp_path, plain):
        train(tmp_path, FlexibleRunner, strategy=strategy)
        model = Model()
        load_checkpoint(model, str(tmp_path / 'epoch_1.pth'), strict=True)
        assert_same(weights(model), plain)

    def test_deepspeed(self, process_group, tmp_path, plain):
        """ZeRO stage 3, where a layer's weights are there only while it is being called.

        MMEngine fits DeepSpeed 0.16, and takes one DeepSpeedStrategy a process.
        """
        pytest.importorskip('deepspeed', reason='deepspeed is not installed')
        runner = train(
            tmp_path, FlexibleRunner,
            strategy=dict(type='DeepSpeedStrategy', inputs_to_half=[], config=dict(
                train_micro_batch_size_per_gpu=2, zero_allow_untested_optimizer=True,
                zero_optimization=dict(stage=3))),
            optim_wrapper=dict(type='DeepSpeedOptimWrapper',
                               optimizer=dict(type='SGD', lr=1e-3)))
        # No weights are left in place; but without the right ones no statistics would agree.
        ours = {name: value for name, value in weights(runner.model).items() if value.numel()}
        assert_same(ours, {name: plain[name] for name in ours})


def assert_same(ours, expected):
    assert set(ours) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def sharded(kind):
    """Weights of these modules are there only while the wrapper around them is being called."""
    return functools.partial(
        fsdp.FullyShardedDataParallel, device_id=torch.device('cpu'), use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({kind}))


def fully_shard(model):
    from torch.distributed.device_mesh import init_device_mesh  # torch 2.2
    for layer in [*ce_layers(model).values(), model]:
        fsdp.fully_shard(layer, mesh=init_device_mesh('cpu', (2, )))
    return model


SHARDED = {'blocks': sharded(CEBasicBlock), 'CE': sharded(SyncCE), 'fully_shard': fully_shard}


def sharded_step(rank, ways):
    """A step on this process's share of the batch, sharded in each of the ways, and not."""
    results = []
    for shard in (CPUDistributedDataParallel, *ways.values()):
        model = shard(Model(ce_cfg=dict(type='SyncCE')))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        power(model(images(4)[2 * rank:2 * rank + 2])).backward()
        optimizer.step()
        results.append(whole_parameters(model))
    return results


def whole_parameters(model):
    is_fsdp = isinstance(model, fsdp.FullyShardedDataParallel)
    with fsdp.FullyShardedDataParallel.summon_full_params(model) if is_fsdp else nullcontext():
        return {re.sub(r'(_fsdp_wrapped_)?module\.', '', name):
                (p.full_tensor() if hasattr(p, 'full_tensor') else p).detach().clone()
                for name, p in model.named_parameters()}


@FSDP_ON_CPU
def test_sharded_steps(tmp_path):
    """FSDP of both generations on two processes, around blocks and around the CE layers alone."""
    with Ranks(2, tmp_path) as processes:
        results = processes.run(sharded_step, SHARDED)
    for expected, *sharded in results:
        assert expected['backbone.ce1.lambda_logit'] != 0
        for way, ours in zip(SHARDED, sharded):
            assert set(ours) == set(expected), way
            for name, value in expected.items():
                torch.testing.assert_close(ours[name], value, msg=f'{way} {name}')
