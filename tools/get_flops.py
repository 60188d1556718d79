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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+')
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='of the image (800 1344 for detectors, 224 224 for classifiers)')
    return parser.parse_args()


def main(arguments):
    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from cenet_mmdet.analysis.complexity import config_complexity

    logging.disable(logging.INFO)
    table = Table()
    for column in ('config', 'parameters, M', 'multiply-adds, G', 'merged, G'):
        table.add_column(column, justify='left' if column == 'config' else 'right')
    with torch.no_grad():
        for path in track(arguments.configs, 'counting'):
            result = config_complexity(path, arguments.size)
            table.add_row(Path(path).stem, f'{result.parameters / 1e6:.2f}',
                          f'{result.multiply_adds / 1e9:.3f}', f'{result.merged / 1e9:.3f}')
    Console(soft_wrap=True).print(table)


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
