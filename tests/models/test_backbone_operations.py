"""CE-ResNet-50: the operations that its CE layers add, and that none waits for a value."""
import pytest
import torch
from mmdet.models.backbones.resnet import ResNet

from cenet_mmdet import CEResNet
from cenet_mmdet.analysis.operations import count_operations

OPTIONS = dict(depth=50, frozen_stages=-1, norm_eval=False, zero_init_residual=False)
LAYERS = 14
CEILINGS = 52, 97, 16  # forward and backward in training, forward in evaluation


def counts(backbone):
    """Operations of the second step, and of an evaluation: the first forward looks at things."""
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        ahead, back = count_operations(lambda: sum(out.mean() for out in backbone(x)), True)
    backbone.eval()
    with torch.no_grad():
        evaluation, _ = count_operations(lambda: sum(out.mean() for out in backbone(x)), False)
    return [sum(counted.values()) for counted in (ahead, back, evaluation)]


def test_operations_that_a_ce_layer_adds():
    plain, ours = (counts(cls(**OPTIONS)) for cls in (ResNet, CEResNet))
    added = [(b - a) / LAYERS for a, b in zip(plain, ours)]
    assert all(count <= ceiling for count, ceiling in zip(added, CEILINGS)), added


@pytest.mark.parametrize('training', [True, False])
def test_nothing_waits_for_a_value(training):
    with torch.device('meta'):
        backbone, x = CEResNet(**OPTIONS), torch.randn(2, 3, 64, 64)
    backbone._statistics_checked = True  # reads the counters, once for each network
    backbone.train(training)
    sum(out.mean() for out in backbone(x)).backward()
    assert all(p.grad.is_meta for p in backbone.parameters() if p.requires_grad)
