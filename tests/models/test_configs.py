"""The shipped configs, and CE inside configs that people already have."""
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tool
from mmdet.registry import DATASETS, MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from cenet_mmdet import CE, SyncCE
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel
from cenet_mmdet.engine.data_errors import data_problems

CONFIGS = ROOT / 'configs'

# Shrinks any MMDetection config to one training step on the shapes.
ONE_STEP = '''
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={with_mask}),
    dict(type='Resize', scale=(128, 128)),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(
        data_root='{data}/', pipeline=train_pipeline, indices=2,
        metainfo=dict(classes=('disk', 'square', 'triangle', 'star', 'cross'))))
train_cfg = dict(max_epochs=1)
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
'''

PLUGIN = "dict(type='CE'), stages=(True, True, True, False), position='after_conv3'"


@pytest.mark.parametrize('base', [
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    # these two are trained in integration/test_detectors.py as well, though not by the command line
    pytest.param('retinanet/retinanet_r50_fpn_1x_coco.py', marks=pytest.mark.long),
    pytest.param('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', marks=pytest.mark.long)])
@pytest.mark.parametrize('backbone', [
    f'dict(plugins=[dict(cfg={PLUGIN})], init_cfg=None, zero_init_residual=False)',
    "dict(type='CEResNet', init_cfg=None)"], ids=['plugins', 'CEResNet'])
def test_one_step_in_an_existing_config(base, backbone, shapes, tmp_path):
    """Written and run in a folder that knows nothing of this project."""
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = 'mmdet::{base}'\n"
        "custom_imports = dict(imports=['cenet_mmdet'])\n"
        f'model = dict(backbone={backbone})\n'
        + ONE_STEP.format(data=shapes, with_mask='mask' in base))
    tool('train.py', 'mine.py', cwd=tmp_path)
    state = torch.load(tmp_path / 'work_dirs/mine/epoch_1.pth', weights_only=False)['state_dict']
    counts = {key: int(value) for key, value in state.items()
              if re.search(r'\.ce1?\.num_batches_tracked', key)}
    # frozen_stages=1 in these configs: layer1 and the stem keep their statistics
    assert counts['backbone.layer1.0.ce.num_batches_tracked'] == 0
    assert counts['backbone.layer2.0.ce.num_batches_tracked'] == 1
    assert len(counts) == (14 if 'CEResNet' in backbone else 13)
    assert state['backbone.layer2.0.ce.lambda_logit'] != 0


def build(name):
    init_default_scope('mmdet')
    return MODELS.build(Config.fromfile(CONFIGS / name).model)


def test_baseline_row_is_mmdetections_2x(tmp_path):
    (tmp_path / 'zoo.py').write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'")
    zoo = Config.fromfile(tmp_path / 'zoo.py')
    ours = Config.fromfile(CONFIGS / 'mask_rcnn_r50.py')
    for key in ('model', 'train_cfg', 'param_scheduler', 'optim_wrapper', 'auto_scale_lr',
                'train_pipeline', 'test_pipeline'):
        assert ours[key] == zoo[key], key
    assert ours.train_cfg.max_epochs == 24
    assert ours.auto_scale_lr.base_batch_size == 16


CONV = r'(conv\d|downsample\.0)\.weight'
NORM = r'(bn\d|downsample\.1)\.(weight|bias)'

# row -> parameters of the backbone that learn, stages whose CE uses batch statistics
ROWS = {
    'mask_rcnn_r50.py': (rf'layer[234]\.\d+\.({CONV}|{NORM})', set()),
    'mask_rcnn_ce_r50.py': (rf'layer[234]\.\d+\.{CONV}', set()),
    'mask_rcnn_syncce_r50.py': (rf'layer[234]\.\d+\.({CONV}|{NORM})', {'layer2', 'layer3'}),
    'mask_rcnn_r101.py': (rf'layer[234]\.\d+\.({CONV}|{NORM})', set()),
    'mask_rcnn_ce_r101.py': (rf'layer[234]\.\d+\.{CONV}', set()),
}


@pytest.mark.parametrize('row', ROWS)
def test_what_learns_and_which_statistics_are_used(row):
    """Table 5's settings, read off the built model. The stem and layer1 are frozen throughout."""
    model = build(row)
    model.train()
    backbone = model.backbone
    pattern, batch_stages = ROWS[row]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad is bool(re.fullmatch(pattern, name)), name
    ce = {name: m for name, m in backbone.named_modules() if isinstance(m, CE)}
    counts = {'mask_rcnn_r50.py': 0, 'mask_rcnn_r101.py': 0, 'mask_rcnn_ce_r101.py': 8}
    assert len(ce) == counts.get(row, 14)
    assert {name.split('.')[0] for name, m in ce.items() if m.uses_batch_statistics} == \
        batch_stages
    synchronized = 'syncce' in row
    assert {type(m) for m in ce.values()} <= {SyncCE if synchronized else CE}
    for name, norm in backbone.named_modules():
        if isinstance(norm, _BatchNorm):
            frozen_stage = name.startswith(('bn1', 'layer1'))
            assert norm.training is (synchronized and not frozen_stage), name
            assert isinstance(norm, torch.nn.SyncBatchNorm) is synchronized
    # heads and neck learn in every row
    assert all(p.requires_grad for name, p in model.named_parameters()
               if not name.startswith('backbone'))


@pytest.mark.parametrize('row', ROWS)
def test_1x_is_half_of_2x(row):
    two, one = Config.fromfile(CONFIGS / row), Config.fromfile(CONFIGS / f'{row[:-3]}_1x.py')
    assert (two.train_cfg.max_epochs, one.train_cfg.max_epochs) == (24, 12)
    assert two.param_scheduler[1].milestones == [16, 22]
    assert (one.param_scheduler[1].milestones, one.param_scheduler[1].end) == ([8, 11], 12)
    assert one.param_scheduler[0] == two.param_scheduler[0]
    assert one.model == two.model
    assert one.optim_wrapper == two.optim_wrapper
    assert one.auto_scale_lr.base_batch_size == 16


class TestDistributedDataParallel:

    @pytest.fixture
    def process_group(self, tmp_path):
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0,
                                world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.parametrize('row', ROWS)
    def test_no_row_needs_find_unused_parameters(self, row, process_group):
        """Images with objects, then without: DDP fails in the step after one with unused ones."""
        self.train(row)

    def test_an_unused_parameter_would_be_seen(self, process_group):
        with pytest.raises(RuntimeError, match='find_unused_parameters'):
            self.train('mask_rcnn_ce_r50.py', unused=torch.nn.Parameter(torch.zeros(1)))

    @staticmethod
    def train(row, **extra):
        cfg = Config.fromfile(CONFIGS / row)
        cfg.model.backbone.init_cfg = None
        if 'ce_' in row:
            cfg.model.backbone.allow_unset = True
        cfg.model.train_cfg.rpn_proposal.max_per_img = 20
        cfg.model.train_cfg.rcnn.sampler.num = 8
        init_default_scope('mmdet')
        model = MODELS.build(cfg.model)
        for name, parameter in extra.items():
            model.register_parameter(name, parameter)
        model = CPUDistributedDataParallel(model)
        optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0))
        model.train()
        for objects in (2, 0, 1):
            data = demo_mm_inputs(1, image_shapes=[(3, 64, 96)], num_items=[objects],
                                  with_mask=True)
            model.train_step(data, optimizer)


class TestFilesOf2014:

    @pytest.fixture
    def coco2014(self, shapes, tmp_path, monkeypatch):
        """The generated set under the names of 2014: 10 = 6 + 4 training images, 6 for mini-val."""
        (tmp_path / 'annotations').mkdir()
        (tmp_path / 'train2014').symlink_to(shapes / 'train2017')
        (tmp_path / 'val2014').mkdir()
        train, val = (json.loads((shapes / f'annotations/instances_{split}2017.json').read_text())
                      for split in ('train', 'val'))
        for data, folder in ((train, 'train2017'), (val, 'val2017')):
            for image in data['images']:  # both folders number their images from 1
                source = shapes / folder / image['file_name']
                if data is val:
                    image['file_name'] = f'minival_{source.name}'
                (tmp_path / 'val2014' / image['file_name']).symlink_to(source)
        for name, data in (('train2014', dict(train, images=train['images'][:6])),
                           ('valminusminival2014', dict(train, images=train['images'][6:])),
                           ('minival2014', val)):
            (tmp_path / f'annotations/instances_{name}.json').write_text(json.dumps(data))
        monkeypatch.setenv('COCO_ROOT', str(tmp_path))
        monkeypatch.setenv('COCO_YEAR', '2014')
        return tmp_path

    def test_both_training_files_and_mini_val_are_read(self, coco2014):
        cfg = Config.fromfile(CONFIGS / 'mask_rcnn_ce_r50.py')
        metainfo = dict(classes=('disk', 'square', 'triangle', 'star', 'cross'))
        for part in cfg.train_dataloader.dataset.datasets:
            part.metainfo = metainfo
            part.filter_cfg = dict(filter_empty_gt=False)
        init_default_scope('mmdet')
        train = DATASETS.build(cfg.train_dataloader.dataset)
        folders = [Path(train.get_data_info(i)['img_path']).parent.name for i in range(len(train))]
        assert folders == ['train2014'] * 6 + ['val2014'] * 4
        for index in (0, 9):
            assert train[index]['inputs'].dim() == 3
        cfg.val_dataloader.dataset.metainfo = metainfo
        assert len(DATASETS.build(cfg.val_dataloader.dataset)) == 6
        assert cfg.test_dataloader.dataset.ann_file == cfg.val_dataloader.dataset.ann_file
        assert cfg.val_evaluator.ann_file == f'{coco2014}/annotations/instances_minival2014.json'

    def test_a_missing_part_is_named(self, coco2014):
        (coco2014 / 'annotations/instances_valminusminival2014.json').unlink()
        problem = data_problems(Config.fromfile(CONFIGS / 'mask_rcnn_r50.py'))[0]
        assert 'instances_valminusminival2014.json is not there' in problem
        assert f"set COCO_ROOT (now '{coco2014}')" in problem

    def test_other_years_are_refused(self, monkeypatch):
        monkeypatch.setenv('COCO_YEAR', '2015')
        with pytest.raises(ValueError, match='must be 2017 or 2014, got'):
            Config.fromfile(CONFIGS / 'mask_rcnn_r50.py')


def test_configs_read_the_environment(monkeypatch):
    monkeypatch.setenv('COCO_ROOT', '/somewhere/coco')
    monkeypatch.setenv('CE_RESNET50_CHECKPOINT', '/somewhere/ce.pth')
    cfg = Config.fromfile(CONFIGS / 'mask_rcnn_ce_r50.py')
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == '/somewhere/coco/'
    for split in ('val', 'test'):
        ann_file = cfg[f'{split}_evaluator'].ann_file
        assert ann_file == '/somewhere/coco/annotations/instances_val2017.json'
    assert cfg.model.backbone.init_cfg.checkpoint == '/somewhere/ce.pth'


def test_a_dumped_config_is_the_same_config(tmp_path):
    """What MMEngine writes into the work dir can be trained from again."""
    for path in [*CONFIGS.glob('*.py'), *CONFIGS.glob('demo/*.py')]:
        cfg = Config.fromfile(path)
        cfg.dump(tmp_path / path.name)
        assert Config.fromfile(tmp_path / path.name).to_dict() == cfg.to_dict()
