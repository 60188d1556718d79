"""Classifiers: the configs of Tables 1 to 4 and of CIFAR-10, and the way on to detection."""
import importlib.util
import pickle
import re

# isort: off
import cenet_mmdet.models.mmpretrain  # noqa: F401 - before mmpretrain, which asks for torchvision
# isort: on
import numpy as np
import pytest
import torch
from conftest import ROOT, tool
from helpers.configs import build, config
from helpers.networks import images
from mmcv.cnn import ConvModule
from mmengine.registry import init_default_scope
from mmpretrain.models import SELayer
from mmpretrain.registry import DATASETS, TRANSFORMS
from torch import nn

from cenet_mmdet import CE, DBN, CEMobileNetV2, IterNorm
from cenet_mmdet.analysis.complexity import complexity
from cenet_mmdet.checkpoint.convert import CheckpointError
from cenet_mmdet.datasets.cifar10 import CorruptedCIFAR10
from cenet_mmdet.models.insert import NormCE
from cenet_mmdet.models.mmpretrain import CEVGG, CEShuffleNetV2
from cenet_mmdet.utils.errors import InputError

DEMO = ROOT / 'configs' / 'demo'

# config -> (CE layers, SE layers, millions of parameters)
ROWS = {
    'resnet18': (0, 0, 11.690), 'resnet50': (0, 0, 25.557), 'resnet101': (0, 0, 44.549),
    'se_resnet18': (0, 8, 11.780), 'se_resnet50': (0, 16, 28.088),
    'se_resnet101': (0, 33, 49.327),
    'ce_resnet18': (9, 0, 12.041), 'ce_resnet50': (14, 0, 29.332),
    'ce_resnet101': (8, 0, 45.175),
    'mobilenet_v2': (0, 0, 3.505), 'se_mobilenet_v2': (0, 17, 3.549),
    'ce_mobilenet_v2': (17, 0, 3.619),
    'shufflenet_v2_x0_5': (0, 0, 1.367), 'se_shufflenet_v2_x0_5': (0, 16, 1.382),
    'ce_shufflenet_v2_x0_5': (16, 0, 1.396),
    'shufflenet_v2_x1_0': (0, 0, 2.279), 'se_shufflenet_v2_x1_0': (0, 16, 2.329),
    'ce_shufflenet_v2_x1_0': (16, 0, 2.448),
    'dbn_resnet18': (0, 0, 11.690), 'dbn_resnet50': (0, 0, 25.557),
    'iternorm_resnet18': (0, 0, 11.690), 'iternorm_resnet50': (0, 0, 25.557),
    'ce_resnet50_bd': (14, 0, 25.557), 'ce_resnet50_ir': (14, 0, 29.332),
    'ce2_resnet50': (14, 0, 25.796),
}


def build_row(row):
    return build(f'imagenet/{row}.py', 'mmpretrain')


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


def test_all_rows_are_listed():
    assert {path.stem for path in (ROOT / 'configs/imagenet').glob('*.py')} == set(ROWS)


@pytest.mark.parametrize('row', ROWS)
def test_imagenet_row(row):
    """The row's layers, its size, and the released code's recipe."""
    model = build_row(row)
    ce_layers, se_layers, millions = ROWS[row]
    assert count(model, CE) == ce_layers
    # mmpretrain's own SE networks and ours have the same layer
    assert count(model, SELayer) == se_layers
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    norms = {'dbn': DBN, 'iternorm': IterNorm}.get(row.split('_')[0])
    if norms:
        assert count(model, norms) == (20 if '18' in row else 53)
        assert not count(model, nn.BatchNorm2d)

    cfg = config(f'imagenet/{row}.py')
    assert set(cfg.optim_wrapper) <= {'optimizer', '_scope_'}  # the same for every parameter
    expected = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert {key: cfg.optim_wrapper.optimizer[key] for key in expected} == expected
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end) == (0, 5)
    assert steps.milestones == [30, 60, 90]
    assert cfg.train_cfg.max_epochs == 100
    assert cfg.train_dataloader.batch_size == 32
    assert cfg.auto_scale_lr == dict(base_batch_size=256, enable=False)
    assert cfg.model.head.loss == dict(type='LabelSmoothLoss', label_smooth_val=0.1)


@pytest.mark.parametrize('row', [
    'ce_resnet18', 'se_resnet18', 'dbn_resnet18', 'iternorm_resnet18', 'se_mobilenet_v2',
    'ce_mobilenet_v2', 'se_shufflenet_v2_x0_5', 'ce_shufflenet_v2_x0_5'])
def test_imagenet_row_runs(row):
    """In training, where all parameters learn, and in evaluation."""
    model = build_row(row)
    model(images()).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model(images()).shape == (2, 1000)


def test_no_norm_starts_at_zero():
    model = build_row('resnet18')
    model.init_weights()
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    conv = model.backbone.layer4[1].conv2.weight  # N(0, 2 / (k * k * C_out))
    assert float(conv.detach().std()) == pytest.approx((2 / (9 * 512))**0.5, rel=0.02)


def test_lighting_does_not_wrap_round():
    """White stays white: in integers 255 + 1 would be black."""
    step, = (t for t in config('imagenet/resnet50.py').train_pipeline if t.type == 'Lighting')
    lighting = TRANSFORMS.build(step)
    np.random.seed(0)  # noqa: NPY002 - MMCV draws from the global generator
    white = np.full((4, 4, 3), 255, np.float32)
    changes = np.stack([lighting(dict(img=white))['img'][0, 0] - 255 for _ in range(2000)])
    assert np.abs(changes).max() < 40
    expected = 0.1**2 * (np.array(step.eigvec) * step.eigval)**2  # per channel and direction
    np.testing.assert_allclose(changes.var(0), expected.sum(1), rtol=0.15)


class TestBackbones:

    @pytest.mark.parametrize(('cls', 'options', 'norm_cfg'), [
        (CEMobileNetV2, dict(out_indices=(1, 2, 4, 7)), {}),
        (CEShuffleNetV2, dict(out_indices=(0, 1, 2)), {}),
        (CEVGG, dict(depth=11, out_indices=(1, 2, 3, 4)), dict(norm_cfg=dict(type='BN')))])
    def test_pyramid_and_plain_weights(self, cls, options, norm_cfg):
        """The parent's pyramid; its weights load with nothing but CE missing."""
        model, parent = cls(**options), cls.__mro__[2](**options, **norm_cfg)
        assert [f.shape for f in model(images())] == [f.shape for f in parent(images())]
        result = model.load_state_dict(parent.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all('.ce.' in key for key in result.missing_keys)

    def test_other_layers_at_ces_places_load_their_own_checkpoint(self):
        model, other = (CEVGG(11, ce_cfg=dict(type='SELayer')) for _ in range(2))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.features[0].bn.ce.conv1.conv.weight,
                           model.features[0].bn.ce.conv1.conv.weight)
        with pytest.raises(CheckpointError, match=r'features\.0\.bn\.ce\..* is missing in the ch'):
            CEVGG(11).load_state_dict(model.state_dict())

    def test_ce_stands_before_rectifier_and_shuffle(self):
        block = CEShuffleNetV2().layers[0][1].branch2[2]
        assert isinstance(block.bn, NormCE) and block.with_activation
        assert isinstance(CEMobileNetV2().layer2[0].linear_conv.bn, NormCE)

    def test_frozen_stages_cover_ce(self):
        model = CEMobileNetV2(frozen_stages=2)
        model.train()
        assert not any(p.requires_grad for p in model.layer2.parameters())
        assert not model.layer2[0].linear_conv.bn.ce.training
        assert model.layer3[0].linear_conv.bn.ce.training

    @pytest.mark.parametrize(('share', 'layers'), [(1.0, 13), (0.75, 9), (0.5, 6), (0.1, 1)])
    def test_share(self, share, layers):
        assert count(CEVGG(16, ce_share=share), CE) == layers

    @pytest.mark.parametrize('arguments', [dict(ce_share=0), dict(ce_share=1.5),
                                           dict(ce_share=0.01), dict(ce_position='beside')])
    def test_bad_arguments(self, arguments):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            CEVGG(16, **arguments)

    def test_frozen_and_never_set_is_refused(self):
        model = CEMobileNetV2(ce_cfg=dict(freeze='all'))
        with pytest.raises(RuntimeError, match='never loaded or trained: layer1'):
            model(torch.randn(1, 3, 32, 32))


class TestCIFAR:

    @pytest.fixture
    def cifar(self, tmp_path):
        """Files in CIFAR-10's format, 20 images in each of the five batches."""
        folder = tmp_path / CorruptedCIFAR10.base_folder
        folder.mkdir()
        content = pickle.dumps({'data': np.zeros((20, 3072), np.uint8), 'labels': [3] * 20})
        for name, _ in CorruptedCIFAR10.train_list + CorruptedCIFAR10.test_list:
            (folder / name).write_bytes(content)
        return folder

    @staticmethod
    def labels(folder, check_md5=False, **options):
        init_default_scope('mmpretrain')
        dataset = DATASETS.build({
            **config('cifar10/vgg16.py').train_dataloader.dataset, 'data_root': str(folder.parent),
            'check_md5': check_md5, **options})
        return [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))]

    def test_other_batches_than_the_originals(self, cifar):
        assert self.labels(cifar) == [3] * 100
        with pytest.raises(InputError, match='Set check_md5=False'):
            self.labels(cifar, check_md5=True)
        (cifar / 'data_batch_2').unlink()
        with pytest.raises(RuntimeError, match='Cannot find CorruptedCIFAR10'):
            self.labels(cifar)

    def test_corrupted_labels(self, cifar):
        clean, some, more = (np.array(self.labels(cifar, corrupted=share))
                             for share in (0, 0.4, 0.8))
        assert (clean == 3).all()
        assert 0.2 < (some != 3).mean() <= 0.4
        assert 0.6 < (more != 3).mean() <= 0.8
        assert (more[some != 3] == some[some != 3]).all()  # the same images and more
        assert self.labels(cifar, corrupted=0.4) == some.tolist()
        assert self.labels(cifar, corrupted=0.4, seed=1) != some.tolist()
        with pytest.raises(ValueError, match='corrupted labels must be in'):
            self.labels(cifar, corrupted=1.2)

    @pytest.mark.parametrize(('norm', 'activation'), [
        (dict(type='BN'), 'ReLU'), (dict(type='BN'), 'ELU'), (dict(type='BN'), 'LeakyReLU'),
        (dict(type='IN', affine=True), 'ReLU'), (dict(type='GN', num_groups=32), 'ReLU'),
        (dict(type='GN', num_groups=1), 'ELU')], ids=str)
    def test_norms_and_activations(self, norm, activation):
        model = build('cifar10/ce_vgg16.py', 'mmpretrain',
                      **{'backbone.norm_cfg': norm, 'backbone.act_cfg.type': activation})
        assert count(model, CE) == 13
        rectifiers = [type(m.activate) for m in model.modules() if isinstance(m, ConvModule)]
        assert rectifiers == [getattr(nn, activation)] * 13
        assert model(images()).shape == (2, 10)


@pytest.mark.long
def test_from_classifier_to_detector(shapes, tmp_path):
    """Pretrain as users do, then train a detector from the checkpoint as it is."""
    tool('dev/crop_objects.py', shapes, tmp_path / 'crops')
    tool('train.py', DEMO / 'ce_r18_shapes_classifier.py', '--auto-scale-lr', '--cfg-options',
         'train_cfg.max_epochs=1', 'train_dataloader.batch_size=8', 'param_scheduler.1.T_max=1',
         cwd=tmp_path, env=dict(IMAGENET_ROOT=str(tmp_path / 'crops')))
    checkpoint = tmp_path / 'work_dirs/ce_r18_shapes_classifier/epoch_1.pth'
    weights = torch.load(checkpoint, weights_only=False)['state_dict']
    out = tool('train.py', DEMO / 'mask_rcnn_ce_r18_shapes_pretrained.py', '--cfg-options',
               'train_cfg.max_epochs=1', 'param_scheduler.1.T_max=1',
               'optim_wrapper.optimizer.lr=0', 'optim_wrapper.optimizer.weight_decay=0',
               'val_dataloader.dataset.indices=1', cwd=tmp_path,
               env=dict(COCO_ROOT=str(shapes), CE_RESNET18_CHECKPOINT=str(checkpoint))).stdout
    assert not re.search('missing keys|unexpected key|size mismatch', out)
    detector = torch.load(tmp_path / 'work_dirs/mask_rcnn_ce_r18_shapes_pretrained/epoch_1.pth',
                          weights_only=False)['state_dict']
    learned = [name for name in weights if name.startswith('backbone.')
               and not re.search(r'running|num_batches', name)]
    assert len(learned) > 60
    assert all(torch.equal(weights[name], detector[name]) for name in learned)


@pytest.mark.parametrize(('name', 'variable'), [
    ('imagenet/ce_resnet50.py', 'IMAGENET_ROOT'), ('cifar10/ce_vgg16.py', 'CIFAR10_ROOT')])
def test_missing_images(name, variable, tool_here, plain_configs, tmp_path):
    result = tool_here('train.py', ROOT / 'configs' / name, cwd=tmp_path,
                       env={variable: '/nowhere'})
    assert result.returncode == 1
    assert f"set {variable} (now '/nowhere" in result.stderr.splitlines()[-1]


def test_torchvision_stays_as_missing_as_it_is():
    if importlib.util.find_spec('torchvision'):
        pytest.skip('torchvision is installed: mmpretrain imports the real one')
    with pytest.raises(ImportError):
        importlib.import_module('torchvision')
    from mmpretrain.datasets.transforms.processing import MAERandomResizedCrop
    with pytest.raises(ImportError, match='needs torchvision'):
        MAERandomResizedCrop(size=8)


@pytest.mark.parametrize(('ratio', 'operator', 'merged'), [
    (None, 32 * 16 * 20, 2 * 32 * 20), (1.0, 32 * 16 * 20, 0), (0.0, 0, 2 * 32 * 20)])
def test_complexity_of_a_layer_by_hand(ratio, operator, merged):
    """C = 32, d = 16, 4 x 5 pixels: 32 * 16 * 20 for the operator, 2 * 32 * 8 for F."""
    ce = CE(32, bd_ratio=ratio)
    result = complexity(ce, lambda: ce(torch.randn(1, 32, 4, 5)))
    subnetwork = 0 if ratio == 1 else 2 * 32 * 8
    assert result.parameters == sum(p.numel() for p in ce.parameters())
    assert result.multiply_adds == operator + subnetwork
    assert result.merged == merged + subnetwork
    assert ce.training
