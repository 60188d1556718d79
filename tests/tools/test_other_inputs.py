"""The tools on configs, checkpoints and folders that are not like the shipped ones."""
import json
import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from cenet_mmdet import CE
from cenet_mmdet.engine.job import job_problems
from cenet_mmdet.models.build import build_model, load_model
from cenet_mmdet.utils.errors import InputError

CLASSES = ('disk', 'square', 'triangle', 'star', 'cross')
# In the new style: imports, types that are classes, and no scope
DETECTOR = '''
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmdet.models import FPN, DetDataPreprocessor, L1Loss, FocalLoss, ResNet, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner
from mmdet.models.task_modules import PseudoSampler
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import SGD

from cenet_mmdet import DataCheckHook

default_scope = None

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32,
                           mean=[100.], std=[50.]),
    backbone=dict(type=ResNet, depth=18, in_channels=CHANNELS, base_channels=8, stem_channels=8,
                  norm_cfg=dict(type='CEBN')),
    neck=dict(type=FPN, in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
    bbox_head=dict(
        type=RetinaHead, num_classes=5, in_channels=8, feat_channels=8, stacked_convs=1,
        anchor_generator=dict(type=AnchorGenerator, ratios=[1.], strides=[8, 16, 32, 64, 128],
                              octave_base_scale=4, scales_per_octave=1),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder), loss_bbox=dict(type=L1Loss),
        loss_cls=dict(type=FocalLoss)),
    train_cfg=dict(assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4),
                   sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=100, score_thr=0., nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=5))
pipeline = [dict(type=LoadImageFromFile), dict(type=Resize, scale=(64, 64)),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                                'scale_factor'))]
train_dataloader = dict(
    batch_size=5, num_workers=0, sampler=dict(type=DefaultSampler),
    dataset=dict(type=CocoDataset, data_root='COCO', data_prefix=dict(img='train2017'),
                 ann_file='annotations/instances_train2017.json', pipeline=pipeline,
                 metainfo=dict(classes=('disk', 'square', 'triangle', 'star', 'cross'))))
val_dataloader = test_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler),
    dataset=dict(type=CocoDataset, data_root='COCO', data_prefix=dict(img='val2017'),
                 ann_file='annotations/instances_val2017.json', pipeline=pipeline, test_mode=True,
                 metainfo=dict(classes=('disk', 'square', 'triangle', 'star', 'cross'))))
val_evaluator = test_evaluator = dict(type=CocoMetric, metric='bbox',
                                      ann_file='COCO/annotations/instances_val2017.json')
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
val_cfg, test_cfg = dict(type=ValLoop), dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=1e-3))
custom_hooks = [dict(type=DataCheckHook)]
'''


def write_config(folder, channels=3, coco='COCO'):
    path = folder / f'detector{channels}.py'
    path.write_text(DETECTOR.replace('CHANNELS', str(channels)).replace('COCO', str(coco)))
    return path


def write_checkpoint(folder, config, **meta):
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, CE):
            module.num_batches_tracked.fill_(1)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'weights.pth')
    return folder / 'weights.pth'


@pytest.mark.parametrize('channels', [1, 4, 5])
def test_models_of_any_number_of_channels(channels, tool_here, tmp_path):
    config = write_config(tmp_path, channels)
    checkpoint = write_checkpoint(tmp_path, config)
    for command, expected in [
            (['get_flops.py', config, '--size', 64, 64], f'detector{channels}'),
            (['deploy.py', config, checkpoint, '--size', 64, 64], 'CE layers folded'),
            (['benchmark.py', 'inference', config, config, '--size', 64, 64, '--repeats', 1],
             f'detector{channels}')]:
        result = tool_here(*command, cwd=tmp_path)
        assert result.returncode == 0 and expected in result.stdout, result.stderr


def test_a_new_style_config_is_trained_tested_and_used(shapes, tool_here, tmp_path):
    config = write_config(tmp_path, coco=shapes)
    assert job_problems(Config.fromfile(config)) == []
    assert tool_here('train.py', config, cwd=tmp_path).returncode == 0
    checkpoint = tmp_path / 'work_dirs/detector3/epoch_1.pth'
    assert 'coco/bbox_mAP' in tool_here('test.py', config, checkpoint, cwd=tmp_path).stdout
    found = tool_here('infer.py', shapes / 'val2017', '--config', config, '--checkpoint',
                      checkpoint, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    detections = json.loads((tmp_path / 'inference/results.json').read_text())
    assert {entry['category'] for entry in detections} <= set(CLASSES) and detections


def test_checkpoints_of_mmdetection_2(tmp_path):
    """Averages beside the weights are passed over; a weight that is missing is an error."""
    config = write_config(tmp_path)
    path = write_checkpoint(tmp_path, config)
    content = torch.load(path)
    weights = content['state_dict']
    content['state_dict'] = {**weights, **{f'ema_{key.replace(".", "_")}': torch.zeros(1)
                                           for key in list(weights)[:3]}}
    torch.save(content, path)
    for key, value in load_model(config, path).state_dict().items():
        assert torch.equal(value, weights[key])
    content['state_dict'].pop('bbox_head.retina_cls.weight')
    torch.save(content, path)
    with pytest.raises(InputError, match=r'does not fit .*retina_cls\.weight'):
        load_model(config, path)


def test_class_names_of_mmdetection_2_and_linked_folders(tool_here, tmp_path):
    """Each folder once, also where a link leads back."""
    config = write_config(tmp_path)
    checkpoint = write_checkpoint(tmp_path, config, CLASSES=tuple('abcde'))
    elsewhere, photos = tmp_path / 'elsewhere', tmp_path / 'photos'
    for folder in (elsewhere, photos):
        folder.mkdir()
        cv2.imwrite(str(folder / 'photo.png'), np.zeros((64, 64, 3), np.uint8))
    (photos / 'linked').symlink_to(elsewhere)
    (elsewhere / 'back').symlink_to(photos)
    found = tool_here('infer.py', 'photos', '--config', config, '--checkpoint', checkpoint,
                      cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert re.search(r'detections in 2 images', found.stdout)
    detections = json.loads((tmp_path / 'inference/results.json').read_text())
    assert {entry['file_name'] for entry in detections} == {'photo.png', 'linked/photo.png'}
    assert {entry['category'] for entry in detections} <= set('abcde')
