"""The shipped configs: what they build, which parameters learn, which files they read."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.configs import build, config
from mmdet.registry import DATASETS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from cenet_mmdet import CE, SyncCE
from cenet_mmdet.engine.cpu_distributed import CPUDistributedDataParallel
from cenet_mmdet.engine.data_errors import data_problems

CONFIGS = ROOT / 'configs'

# Makes a row of Table 5 slim; its structure and its settings stay.
SLIM_ROW = {
    'backbone.base_channels': 8, 'backbone.init_cfg': None, 'neck.in_channels': [32, 64, 128, 256],
    'roi_head.bbox_head.fc_out_channels': 32, 'train_cfg.rpn_proposal.max_per_img': 20,
    'train_cfg.rcnn.sampler.num': 8}


def build_row(row):
    return build(row, **SLIM_ROW, **({'backbone.allow_unset': True} if 'ce_' in row else {}))


def test_baseline_row_is_mmdetections_2x(tmp_path):
    (tmp_path / 'zoo.py').write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'")
    zoo = Config.fromfile(tmp_path / 'zoo.py')
    ours = config('mask_rcnn_r50.py')
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
    model = build_row(row)
    model.train()
    backbone = model.backbone
    pattern, batch_stages = ROWS[row]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad is bool(re.fullmatch(pattern, name)), name
    ce = {name: m for name, m in backbone.named_modules() if isinstance(m, CE)}
    counts = {'mask_rcnn_r50.py': 0, 'mask_rcnn_r101.py': 0, 'mask_rcnn_ce_r101.py': 8}
    assert len(ce) == counts.get(row, 14)
    using = {name.split('.')[0] for name, m in ce.items() if m.uses_batch_statistics}
    assert using == batch_stages
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
    two, one = config(row), config(f'{row[:-3]}_1x.py')
    assert (two.train_cfg.max_epochs, one.train_cfg.max_epochs) == (24, 12)
    (warm_up, two_steps), (same_warm_up, steps) = two.param_scheduler, one.param_scheduler
    assert (two_steps.milestones, steps.milestones, steps.end) == ([16, 22], [8, 11], 12)
    assert same_warm_up == warm_up and one.auto_scale_lr.base_batch_size == 16
    assert one.model == two.model and one.optim_wrapper == two.optim_wrapper


class TestDistributedDataParallel:

    @pytest.mark.parametrize('row', ROWS)
    def test_no_row_needs_find_unused_parameters(self, row, process_group):
        """Images with objects, then without: DDP fails in the step after one with unused ones."""
        self.train(row)

    def test_an_unused_parameter_would_be_seen(self, process_group):
        with pytest.raises(RuntimeError, match='find_unused_parameters'):
            self.train('mask_rcnn_ce_r50.py', unused=torch.nn.Parameter(torch.zeros(1)))

    @staticmethod
    def train(row, **extra):
        model = build_row(row)
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
            part.update(metainfo=metainfo, filter_cfg=dict(filter_empty_gt=False))
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
    monkeypatch.setenv('COCO_ROOT', '/coco')
    monkeypatch.setenv('CE_RESNET50_CHECKPOINT', '/somewhere/ce.pth')
    cfg = Config.fromfile(CONFIGS / 'mask_rcnn_ce_r50.py')
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == '/coco/'
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.ann_file == '/coco/annotations/instances_val2017.json'
    assert cfg.model.backbone.init_cfg.checkpoint == '/somewhere/ce.pth'


@pytest.mark.parametrize('name', ['mask_rcnn_syncce_r50_1x.py', 'demo/ce_r18_shapes_classifier.py',
                                  'demo/mask_rcnn_ce_r18_shapes_pretrained.py'])
def test_a_dumped_config_is_the_same_config(name, plain_configs, tmp_path):
    """What MMEngine writes into the work dir can be trained from again."""
    config(name).dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == config(name).to_dict()
