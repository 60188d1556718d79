"""The package as such: what it imports, requires and registers."""
import subprocess
import sys
from importlib.metadata import requires

from conftest import ROOT, run

WITHOUT = '''
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools', 'cv2', 'matplotlib'):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from cenet_mmdet import CE
ce = CE(32)
x = torch.randn(2, 32, 4, 4, requires_grad=True)
ce(x).sum().backward()
ce.eval()(x)
CE(32).load_state_dict(ce.state_dict())
print('works with torch alone')
'''


def test_layers_need_torch_alone(tmp_path):
    assert 'works with torch alone' in run(sys.executable, '-c', WITHOUT, cwd=tmp_path).stdout


def test_importing_registers_for_every_library(tmp_path):
    code = ('import cenet_mmdet; from mmengine.registry import MODELS; '
            'print(MODELS.get("CE"), MODELS.get("CEResNet"))')
    out = run(sys.executable, '-W', 'ignore', '-c', code, cwd=tmp_path).stdout
    assert 'cenet_mmdet.layers.ce.CE' in out
    assert 'cenet_mmdet.backbones.ce_resnet.CEResNet' in out


def test_installing_pulls_nothing():
    """torch, mmcv and mmdet stay as the user has them: all requirements are optional extras."""
    assert all('extra ==' in requirement for requirement in requires('cenet-mmdet') or [])
    names = ' '.join(requires('cenet-mmdet'))
    assert not any(name in names for name in ('torch', 'mmcv', 'mmengine', 'mmdet'))


def test_make_help_lists_the_commands():
    out = subprocess.run(['make', '-C', str(ROOT), 'help'], capture_output=True, text=True,
                         check=True).stdout
    for command in ('make demo', 'make test', 'make lint', 'make setup'):
        assert command in out
