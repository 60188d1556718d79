"""tools/analyze_channels.py as typed: a report of two models, and its refusals."""
import json
import re

import pytest
import torch
from conftest import ROOT, tool
from mmengine.config import Config

CONFIG = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes.py'
# untrained weights detect nothing with confidence, and without detections there is no metric
SCORES = 'model = dict(test_cfg=dict(rcnn=dict(score_thr=0.001, max_per_img=10)))\n'
PLAIN = "model['backbone'] = dict(type='ResNet', zero_init_residual=False)\n"


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Configs and checkpoints of the demo's detector with CE, and with batch norm alone."""
    from mmdet.utils import register_all_modules
    from mmengine.registry import MODELS
    register_all_modules()
    folder = tmp_path_factory.mktemp('models')
    given = {}
    for name, change in (('ce', ''), ('bn', PLAIN)):
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        config.write_text(f"_base_ = '{CONFIG}'\n{SCORES}{change}")
        torch.manual_seed(0)
        model = MODELS.build(Config.fromfile(config).model)
        model.train()
        model.backbone(torch.randn(2, 3, 64, 64))
        if name == 'bn':  # half of the channels behind the first rectifier of layer2 are dead
            norm = model.backbone.layer2[0].bn1
            norm.weight.data[::2] = norm.bias.data[::2] = 0
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        given[name] = config, checkpoint
    return given


def test_report_of_two_models(models, shapes, tmp_path):
    tool('analyze_channels.py', *models['ce'], '--against', *models['bn'], '--out', 'found',
         '--images', 3, '--ablate', '--seeds', 1, '--ablated-layers', r'layer4\..*',
         cwd=tmp_path, env=dict(COCO_ROOT=str(shapes)))
    report = json.loads((tmp_path / 'found/report.json').read_text())
    assert report['images'] == 3
    ce, bn = report['models']['ce'], report['models']['bn']
    assert bn['inhibited']['layers']['layer2.0.relu#1'] == 0.5
    assert bn['gamma']['layer2.0.bn1'] == dict(share=0.5)
    assert set(ce['gamma']['layer1.0.bn2']) == {'share', 'effective_share'}
    assert list(ce['correlation']['layer3.1.ce']) == ['input', 'bd', 'ir', 'output']
    # the same places in both networks: where CE is in one of them
    assert len(bn['correlation']) == len(ce['correlation']) == len(ce['operators']) == 9
    assert ce['operators']['ce1']['lambda'] == 0.5
    assert len(ce['operators']['ce1']['eigenvalues']) == 24
    assert bn['operators'] == bn['proposition'] == {}
    for model in (ce, bn):
        curve = model['ablation']
        assert curve['metric'] == 'coco/segm_mAP'
        assert [len(values) for values in curve['values']] == [len(curve['fractions'])]
    pictures = {path.stem for path in (tmp_path / 'found').glob('*.png')}
    assert pictures == {'inhibited', 'gammas', 'magnitudes', 'correlations', 'operators',
                        'ablation'}
    page = (tmp_path / 'found/report.html').read_text()
    sources = re.findall(r'src="([^"]{10})', page)
    assert sources == ['data:image'] * 6
    assert 'http' not in page


@pytest.mark.parametrize(('change', 'message'), [
    (['--layer', 'layer9'], "no layer 'layer9'"),
    (['--ablate', '--ablated-layers', 'layer9'], "'layer9' matches the whole name of no norm"),
    (['empty'], 'has no images'),
    (['missing'], 'checkpoint not found: missing.pth'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_refusals_are_one_line_and_leave_nothing(models, shapes, tmp_path, change, message):
    config, checkpoint = models['ce']
    if change == ['missing']:
        change, checkpoint = [], 'missing.pth'
    if change == ['empty']:
        content = json.loads((shapes / 'annotations/instances_val2017.json').read_text())
        empty = tmp_path / 'empty.json'
        empty.write_text(json.dumps({**content, 'images': [], 'annotations': []}))
        new = tmp_path / 'empty.py'
        new.write_text(f"_base_ = '{config}'\nval_dataloader = dict(dataset=dict("
                       f"ann_file='{empty}'))\n")
        change, config = [], new
    result = tool('analyze_channels.py', config, checkpoint, '--out', 'found', '--images', 1,
                  *change, cwd=tmp_path, check=False, env=dict(COCO_ROOT=str(shapes)))
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / 'found' / 'report.json').exists()
