#!/usr/bin/env python3
"""Put CE into untrained networks of timm and torchvision, fold them, and write a table.

    make test-networks

In each network: CE goes behind every norm that `insert_ce` knows, the network's own state dict is
loaded, and one step of training sets the statistics. In evaluation mode, conversions to SyncBN
and SyncCE must not change the output, and `fuse_ce` folds the network; a second input compares it
with the unfolded one. All in float64, with small images, in one thread. The exit status is 1 if
anything fails but with a message of `insert_ce` or `fuse_ce`.
"""
import argparse
import copy
import os
import platform
import re
import sys
from pathlib import Path

import timm
import torch
import torchvision
from timm.layers import convert_sync_batchnorm
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from cenet_mmdet import CE, SyncCE, insert_ce
from cenet_mmdet.deploy import CEConv2d, fuse_ce
from cenet_mmdet.deploy.compare import deviation, run, tensors
from cenet_mmdet.models.insert import NormCE, channels_of, is_norm
from cenet_mmdet.utils.errors import InputError, first_line
from cenet_mmdet.utils.files import replacing

ROOT = Path(__file__).resolve().parent.parent.parent
TIMM = [
    'resnet18', 'resnet50', 'resnet50_gn', 'wide_resnet50_2', 'resnext50_32x4d', 'seresnet50',
    'resnetv2_50', 'res2net50_26w_4s', 'resnest14d', 'skresnet18', 'regnetx_002', 'regnety_002',
    'mobilenetv1_100', 'mobilenetv2_100', 'mobilenetv3_small_100', 'mobilenetv4_conv_small',
    'mnasnet_small', 'efficientnet_b0', 'tf_efficientnet_b0', 'efficientnetv2_rw_t',
    'tinynet_e', 'fbnetc_100', 'hardcorenas_a', 'rexnet_100', 'lcnet_050', 'ghostnet_100',
    'densenet121', 'dla34', 'vgg11_bn', 'hrnet_w18_small', 'xception41', 'legacy_xception',
    'inception_v3', 'dpn68', 'darknet53', 'cspresnet50', 'ese_vovnet19b_dw', 'repvgg_a0',
    'convnext_tiny', 'convnextv2_atto']
DETECTORS = ('Mask R-CNN', 'RetinaNet')
TOLERANCE = 1e-10
HEADER = '''# Networks of other libraries

This page lists networks of timm and torchvision in which `insert_ce` put CE behind every norm
that it knows, and which `fuse_ce` then folded. They are untrained. The detectors have a ResNet-50
with FPN and frozen batch norms.

- *norms*: all norms of the network, also layer norms over the last dimension, which CE cannot
  follow.
- *folded into a layer*: CE layers that are now part of the convolution or linear layer in front.
- *one step with the norm*: CE layers with no such layer in front, or one whose output is also read
  elsewhere.
- *deviation*: of the folded network's output, relative to its largest value, in float64.

Each network loads its own state dict after CE was inserted. Its output stays the same after
`nn.SyncBatchNorm.convert_sync_batchnorm`, `timm.layers.convert_sync_batchnorm` and
`SyncCE.convert_sync_ce`. The table says where something fails.

`make test-networks` on {machine}; torch {torch}, torchvision {torchvision}, timm {timm}.

| network | norms | CE layers | folded into a layer | one step with the norm | deviation |
|---|---|---|---|---|---|
'''


def classifier(name):
    """The network, a function that makes its arguments, and its loss."""
    size = 128 if name.startswith('inception') else 64

    def example():
        return (torch.randn(2, 3, size, size, dtype=torch.float64), )
    return timm.create_model(name), example, lambda model: model(*example()).square().mean()


def detector(name):
    # Detections of any score, as an untrained detector has no certain ones.
    sizes = dict(min_size=128, max_size=160)
    if name == 'RetinaNet':
        backbone = resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=5,
                                       returned_layers=[2, 3, 4],
                                       extra_blocks=LastLevelP6P7(256, 256))
        model = detection.RetinaNet(backbone, 3, score_thresh=0., **sizes)
    else:
        backbone = resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=5)
        model = detection.MaskRCNN(backbone, 3, box_score_thresh=0., **sizes)

    def example():
        return ([torch.rand(3, 128, 160, dtype=torch.float64)], )

    def loss(model):
        target = dict(boxes=torch.tensor([[10., 20, 90, 100]], dtype=torch.float64),
                      labels=torch.tensor([1]), masks=torch.ones(1, 128, 160, dtype=torch.uint8))
        return sum(model(*example(), [target]).values())
    return model, example, loss


def outputs(model, example):
    return [tensor.clone() for tensor in tensors(run(model, example))]


def train_with_ce(network, loss):
    """The network with CE behind its norms, its own weights, and statistics of a step."""
    weights = copy.deepcopy(network.state_dict())
    model = insert_ce(network, lambda _, norm: channels_of(norm) is not None)
    keys = model.load_state_dict(weights, strict=False)
    wrong = keys.unexpected_keys + [key for key in keys.missing_keys if '.ce.' not in key]
    if wrong:
        raise AssertionError(f'the state dict does not load: {", ".join(wrong)}')
    model.double().train()
    loss(model).backward()
    return model.eval()


def check_conversions(model, example, expected):
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm,
                    SyncCE.convert_sync_ce):
        error = deviation(outputs(convert(copy.deepcopy(model)), example), expected)
        if not error <= TOLERANCE:
            raise AssertionError(f'{convert.__name__} changes the output by {error:.0e}')


def row(name):
    """Cells of the table for one network; the last is a reason where something is refused."""
    torch.manual_seed(0)
    network, make_example, loss = (detector if name in DETECTORS else classifier)(name)
    norms = sum(is_norm(module) for module in network.modules())
    model = train_with_ce(network, loss)
    layers = sum(isinstance(module, CE) for module in model.modules())
    example = make_example()
    expected = outputs(model, example)
    check_conversions(model, example, expected)
    try:
        folded = list(fuse_ce(model, make_example()).modules())
    except InputError as error:
        reason = re.sub(r'[^:]*: .*\((.*)\)', r'\1', first_line(error))
        return [norms, layers, 0, 0, f'refused: {reason}']
    error = deviation(outputs(model, example), expected)
    if not error <= TOLERANCE:
        raise AssertionError(f'the folded model deviates by {error:.0e}')
    steps = sum(isinstance(module, NormCE) and isinstance(module.ce, CE) for module in folded)
    return [norms, layers, sum(isinstance(module, CEConv2d) for module in folded), steps,
            f'{error:.0e}']


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'networks.md',
                        help='file to write (docs/networks.md)')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, rows, failed = [*TIMM, *DETECTORS], [], 0
    for number, name in enumerate(names, 1):
        try:
            cells = row(name)
        except Exception as error:
            failed += 1
            cells = ['', '', '', '', f'fails: {type(error).__name__}: {first_line(error)}']
        rows.append(f'| {" | ".join(map(str, [name, *cells]))} |\n')
        print(f'{number}/{len(names)} {rows[-1]}', end='', flush=True)
    machine = f'{os.cpu_count()} cores ({platform.machine()}), one thread'
    with replacing(arguments.out) as partial:
        partial.write_text(HEADER.format(
            machine=machine, torch=torch.__version__, torchvision=torchvision.__version__,
            timm=timm.__version__) + ''.join(rows))
    sys.exit(f'{failed} of {len(names)} networks failed' if failed else 0)


if __name__ == '__main__':
    main()
