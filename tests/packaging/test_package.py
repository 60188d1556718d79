"""The package as such: what it imports, requires and registers, and its configs by name."""
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, run
from mmengine.config import Config
from mmengine.fileio import load

WITHOUT = '''
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools', 'cv2', 'matplotlib'):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from cenet_mmdet import CE, insert_ce
from cenet_mmdet.deploy import fuse_ce
ce = CE(32)
x = torch.randn(2, 32, 4, 4, requires_grad=True)
ce(x).sum().backward()
ce.eval()(x)
CE(32).load_state_dict(ce.state_dict())
network = torch.nn.Sequential(torch.nn.Conv2d(32, 8, 1), torch.nn.BatchNorm2d(8))
network = insert_ce(network, '1')
network(x)
fuse_ce(network.eval(), x)
print('works with torch alone')
'''


def test_layers_insertion_and_folding_need_torch_alone(tmp_path):
    assert 'works with torch alone' in run(sys.executable, '-c', WITHOUT, cwd=tmp_path).stdout


def test_make_help_lists_the_commands():
    out = subprocess.run(['make', '-C', str(ROOT), 'help'], capture_output=True, text=True,
                         check=True).stdout
    for command in ('make demo', 'make test', 'make lint', 'make setup'):
        assert command in out


@pytest.fixture(scope='module')
def models():
    """Entries of the metafiles, as MMEngine and MIM read them."""
    metafiles = [load(ROOT / path) for path in load(ROOT / 'model-index.yml')['Import']]
    collections = {c['Name'] for metafile in metafiles for c in metafile.get('Collections', ())}
    models = [model for metafile in metafiles for model in metafile['Models']]
    assert {model['In Collection'] for model in models} == collections
    return models


class TestMetafiles:

    def test_every_config_has_an_entry_of_its_own(self, models):
        configs = {path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/**/*.py')
                   if path.parent.name not in ('_base_', 'demo')}
        assert Counter(model['Config'] for model in models) == Counter(configs)
        assert max(Counter(model['Name'] for model in models).values()) == 1

    def test_no_result_of_the_papers_passes_for_ours(self, models):
        assert not [m['Name'] for m in models if 'Results' in m or 'Weights' in m]

    @pytest.mark.parametrize('path', ['mask_rcnn_ce_r50.py', 'mask_rcnn_ce_r50_1x.py',
                                      'imagenet/ce_resnet50.py', 'cifar10/ce_vgg16.py'])
    def test_what_an_entry_says_is_what_the_config_does(self, path, models):
        entry, = (model for model in models if model['Config'] == f'configs/{path}')
        cfg = Config.fromfile(ROOT / 'configs' / path)
        assert entry['Metadata']['Epochs'] == cfg.train_cfg.max_epochs
        assert entry['Metadata']['Batch Size'] == cfg.auto_scale_lr.base_batch_size
