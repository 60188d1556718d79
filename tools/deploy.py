#!/usr/bin/env python3
"""Fold a trained model's batch norms and CE layers for inference; check, and export it.

    python tools/deploy.py configs/mask_rcnn_ce_r50.py work_dirs/mask_rcnn_ce_r50/epoch_24.pth
    python tools/deploy.py CONFIG CHECKPOINT --onnx dense.onnx

Folds backbone, neck and dense head, and compares their outputs with those of the trained model
on a generated image: the largest deviation, and the time. --onnx writes these parts with variable
height and width, and runs the file in onnxruntime on three sizes.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

STRIDE = 32
BOUND = 1e-3  # relative to an output's largest value; beyond it no file is left


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--onnx', type=Path, metavar='FILE', help='write the folded dense part')
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344),
                        metavar=('HEIGHT', 'WIDTH'), help='of the images compared (800 1344)')
    arguments = parser.parse_args()
    if any(size < STRIDE or size % STRIDE for size in arguments.size):
        parser.error(f'--size must be two multiples of {STRIDE}, got {arguments.size}')
    return arguments


def seconds(function, repeats=3):
    """The best of a few runs after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def fold(model, images):
    """The model and a folded copy, both without what follows the dense head."""
    import torch

    from cenet_mmdet import CE
    from cenet_mmdet.deploy import fuse_ce
    from cenet_mmdet.deploy.compare import deviation
    from cenet_mmdet.deploy.export import DensePart

    dense = DensePart(model)
    folded = fuse_ce(copy.deepcopy(dense), images)
    layers = sum(isinstance(module, CE) for module in dense.modules())
    with torch.inference_mode():
        error = deviation(folded(images), dense(images))
        ratio = seconds(lambda: folded(images)) / seconds(lambda: dense(images))
    height, width = images.shape[2:]
    print(f'{layers} CE layers folded; at {height} x {width} the outputs deviate by at most '
          f'{error:.1e} of their largest value, in {ratio:.2f} of the time')
    return folded


def export(folded, path, images):
    import numpy as np
    import torch

    from cenet_mmdet.deploy.compare import deviation
    from cenet_mmdet.deploy.export import export_onnx

    names = export_onnx(folded, path, images)
    print(f'{path}: {", ".join(names)}')
    try:
        import onnxruntime
    except ImportError:
        print('not run: onnxruntime is not installed (pip install onnxruntime)')
        return
    session = onnxruntime.InferenceSession(str(path))
    height, width = images.shape[2:]
    for size in ((height, width), (2 * STRIDE, 3 * STRIDE), (width, height)):
        image = torch.randn(1, images.shape[1], *size)
        outputs = session.run(None, {'images': np.asarray(image)})
        with torch.inference_mode():
            error = deviation([torch.from_numpy(o) for o in outputs], folded(image))
        print(f'onnxruntime at {size[0]} x {size[1]}: within {error:.1e}')
        if not error < BOUND:
            path.unlink()
            sys.exit(f'that is more than rounding ({BOUND}): {path} is removed')


def main(arguments):
    import torch

    from cenet_mmdet.models.build import input_channels, load_model

    model = load_model(arguments.config, arguments.checkpoint)
    torch.manual_seed(0)
    images = torch.randn(1, input_channels(model), *arguments.size)
    folded = fold(model, images)
    if arguments.onnx:
        export(folded, arguments.onnx, images)


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
