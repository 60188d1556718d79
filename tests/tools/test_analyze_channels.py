"""tools/analyze_channels.py as typed: reports of detectors and of a classifier, and refusals."""
import importlib.util
import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.structures import InstanceData

from cenet_mmdet.models.build import build_model, load_config
from cenet_mmdet.utils.errors import InputError

SPEC = importlib.util.spec_from_file_location('tool', ROOT / 'tools' / 'analyze_channels.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

CONFIG = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes.py'
# untrained weights detect nothing with confidence, and without detections there is no metric
SCORES = 'model = dict(test_cfg=dict(rcnn=dict(score_thr=0.001, max_per_img=10)))\n'
PLAIN = "model['backbone'] = dict(type='ResNet', zero_init_residual=False)\n"


def save_model(config, silent=None):
    """Config and checkpoint; half of the channels behind the norm `silent` are dead."""
    torch.manual_seed(0)
    model = build_model(config)
    model.train()
    model.backbone(torch.randn(2, next(model.backbone.parameters()).shape[1], 64, 64))
    if silent:
        norm = model.backbone.get_submodule(silent)
        norm.weight.data[::2] = norm.bias.data[::2] = 0
    torch.save(dict(state_dict=model.state_dict()), config.with_suffix('.pth'))
    return config, config.with_suffix('.pth')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Of the demo's detector with CE, and with batch norm alone."""
    ce, bn = (tmp_path_factory.mktemp('models') / f'{name}.py' for name in ('ce', 'bn'))
    ce.write_text(f"_base_ = '{CONFIG}'\n{SCORES}")
    bn.write_text(f"_base_ = '{CONFIG}'\n{SCORES}{PLAIN}")
    return save_model(ce), save_model(bn, 'layer2.0.bn1')


def test_report_of_two_detectors(models, shapes, tmp_path, tool_here):
    result = tool_here(
        'analyze_channels.py', *models[0], '--against', *models[1], '--out', 'found',
        '--images', 3, '--ablate', '--seeds', 1, '--ablated-layers', r'layer4\..*',
        cwd=tmp_path, env=dict(COCO_ROOT=str(shapes)))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / 'found/report.json').read_text())
    assert report['images'] == 3 and list(report['models']) == ['ce', 'bn']
    ce, bn = report['models'].values()
    assert bn['inhibited']['layer2.0.relu#1'] == bn['small_gamma']['layer2.0.bn1'] == 0.5
    # the same places in both networks: where CE is in one of them, in the order of depth
    places = ['ce1', *(f'layer{i}.{j}.ce' for i in (1, 2, 3, 4) for j in (0, 1))]
    for measured in (ce['bd_ratio'], ce['eigenvalues'], ce['correlation']['bd']):
        assert list(measured) == places
    assert list(bn['correlation']['output']) == list(ce['small_effective_gamma']) == [
        name.replace('ce1', 'bn1').replace('.ce', '.bn2') for name in places]
    assert ce['bd_ratio']['ce1'] == 0.5 and len(ce['eigenvalues']['ce1']) == 24
    assert bn['bd_ratio'] == bn['gamma_growth'] == bn['small_effective_gamma'] == {}
    for ablation in (ce['ablation'], bn['ablation']):
        assert ablation['fractions'] == pytest.approx(np.linspace(0, 0.9, 10))
        assert {'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP_75'} < set(ablation['curves'])
        assert all(np.shape(curve) == (1, 10) for curve in ablation['curves'].values())
    assert sorted(path.stem for path in (tmp_path / 'found').glob('*.png')) == [
        'ablation', 'correlations', 'gammas', 'inhibited', 'magnitudes', 'operators']
    page = (tmp_path / 'found/report.html').read_text()
    assert re.findall(r'src="([^"]{10})', page) == ['data:image'] * 6 and 'http' not in page
    assert '<td>ce</td>' in page and re.search(r'^bn .* \d\.\d{3} +-$', result.stdout, re.MULTILINE)


CLASSIFIER = '''
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet_CIFAR

default_scope = 'mmpretrain'
model = dict(type=ImageClassifier, neck=dict(type=GlobalAveragePooling),
             backbone=dict(type=ResNet_CIFAR, depth=18, in_channels=4, base_channels=8,
                           stem_channels=8, norm_cfg=dict(type='CEBN')),
             head=dict(type=LinearClsHead, num_classes=2, in_channels=64, topk=(1, )))
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=CustomDataset, data_root='images', data_prefix=dict(img_path=''), pipeline=[
        dict(type=LoadImageFromFile, color_type='unchanged'), dict(type=PackInputs)]))
val_evaluator = dict(type=Accuracy, topk=(1, ))
'''


def test_report_of_a_new_style_classifier_of_four_channels(tmp_path, tool_here):
    for label in 'ab':  # two images alike, of two classes
        (tmp_path / 'images' / label).mkdir(parents=True)
        image = np.random.default_rng(0).integers(0, 255, (32, 32, 4), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'images' / label / 'image.png'), image)
    (tmp_path / 'classifier.py').write_text(CLASSIFIER)
    tool_here('analyze_channels.py', *save_model(tmp_path / 'classifier.py'), '--out', 'found',
              '--ablate', cwd=tmp_path)
    model, = json.loads((tmp_path / 'found/report.json').read_text())['models'].values()
    assert model['ablation']['curves']['accuracy/top1'][0][0] == 50
    assert next(iter(model['correlation']['output'])) == 'bn1.ce' and 'bn1' in model['small_gamma']


class Perfect:
    """Detects what is there, in the coordinates of the annotations."""

    def val_step(self, data):
        for sample in data['data_samples']:
            boxes, labels = sample.gt_instances.bboxes.tensor, sample.gt_instances.labels
            sample.pred_instances = InstanceData(bboxes=boxes, labels=labels,
                                                 scores=torch.ones(len(boxes)))
        return [sample.to_dict() for sample in data['data_samples']]


def without_root(dataset):
    root = dataset['data_root']
    return dict(dataset, data_root=None, ann_file=os.path.join(root, dataset['ann_file']),
                data_prefix=dict(img=os.path.join(root, dataset['data_prefix']['img'])))


@pytest.mark.parametrize(('of_dataset', 'of_metric'), [
    (without_root, dict),
    (dict, lambda metric: [metric, dict(metric, prefix='again')]),
    (dict, lambda metric: dict(metrics=[metric])),
    (lambda dataset: dict(type='ConcatDataset', datasets=[
        dict(dataset, indices=2), dict(dataset, indices=[4, 5])]), dict),
    (lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset), dict)])
def test_first_images_of_any_data_set(of_dataset, of_metric, shapes, tmp_path, monkeypatch):
    """A perfect detector has an AP of 1, which it has not if other images count too."""
    monkeypatch.setenv('COCO_ROOT', str(shapes))
    cfg = load_config(CONFIG, {'val_evaluator.metric': 'bbox'})
    cfg.val_dataloader.dataset = of_dataset(cfg.val_dataloader.dataset)
    cfg.val_evaluator = of_metric(cfg.val_evaluator)
    loader = TOOL.build_loader(cfg, images=3)
    evaluator = TOOL.build_evaluator(cfg, loader.dataset, tmp_path)
    metrics = TOOL.evaluate(Perfect(), loader, evaluator)
    found = [value for name, value in metrics.items() if name.endswith('bbox_mAP')]
    assert found == [1] * len(evaluator.metrics) and len(loader.dataset) == 3


def test_annotations_that_cannot_be_cut_and_data_without_images(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv('COCO_ROOT', str(shapes))
    cfg = load_config(CONFIG, {'val_evaluator.ann_file': str(tmp_path / 'lines.odgt')})
    (tmp_path / 'lines.odgt').write_text('{"ID": 1}\n{"ID": 2}\n')
    with pytest.raises(InputError, match=r'no annotations in COCO.s format,.* all 6 images'):
        TOOL.build_evaluator(cfg, TOOL.build_loader(cfg, images=3).dataset, tmp_path)
    cfg.val_dataloader.dataset.ann_file = str(tmp_path / 'empty.json')
    (tmp_path / 'empty.json').write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match='check that it has images'):
        TOOL.build_loader(cfg, images=3)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('ce.pth', ['--layer', 'layer9'], "'layer9' matches the whole name of no layer"),
    ('ce.pth', ['--ablate', '--ablated-layers', 'x'], "'x' matches the whole name of no norm"),
    ('missing.pth', [], 'checkpoint not found: ')])
def test_refusals_leave_nothing(models, shapes, tmp_path, tool_here, name, options, message):
    config, checkpoint = models[0]
    result = tool_here('analyze_channels.py', config, checkpoint.with_name(name), '--out', 'found',
                       '--images', 1, *options, cwd=tmp_path, env=dict(COCO_ROOT=str(shapes)))
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
    assert not (tmp_path / 'found').exists()
