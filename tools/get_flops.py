#!/usr/bin/env python3
"""Count parameters and multiply-adds of detectors and classifiers.

    python tools/get_flops.py configs/mask_rcnn_r50.py configs/mask_rcnn_ce_r50.py
    python tools/get_flops.py configs/imagenet/ce_resnet50.py --size 224 224

Weights are random, images generated; neither data nor checkpoints are needed.
"Multiply-adds" are all that is computed, CE's batched products included; "merged" is
the paper's convention (Table 1): BD merged into the convolution before it.
"""
import argparse
import logging
from pathlib import Path

SIZES = {'detector': (800, 1344), 'classifier': (224, 224)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+')
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='of the image (800 1344 for detectors, 224 224 for classifiers)')
    return parser.parse_args()


def count(path, size=None):
    """Complexity of the config's model for one image."""
    import torch
    from _mmdet import build_model

    from cenet_mmdet.complexity import complexity

    torch.manual_seed(0)
    model = build_model(path)
    is_detector = hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')
    height, width = size or SIZES['detector' if is_detector else 'classifier']
    if is_detector:
        from mmdet.testing import demo_mm_inputs
        data = demo_mm_inputs(1, image_shapes=[(3, height, width)], with_mask=True)
        data = model.data_preprocessor(data, False)
        return complexity(model, lambda: model(**data, mode='predict'))
    image = torch.randn(1, 3, height, width)
    return complexity(model, lambda: model(image))


def main():
    arguments = parse_args()
    # after the parsing, so that --help answers at once
    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    logging.disable(logging.INFO)
    table = Table()
    for column in ('config', 'parameters, M', 'multiply-adds, G', 'merged, G'):
        table.add_column(column, justify='left' if column == 'config' else 'right')
    with torch.no_grad():
        for path in track(arguments.configs, 'counting'):
            result = count(path, arguments.size)
            table.add_row(Path(path).stem, f'{result.parameters / 1e6:.2f}',
                          f'{result.multiply_adds / 1e9:.3f}', f'{result.merged / 1e9:.3f}')
    Console(soft_wrap=True).print(table)


if __name__ == '__main__':
    main()
