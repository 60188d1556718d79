#!/usr/bin/env python3
"""Draw what ChannelHealthHook logged while training: a line for each stage, a row for each run.

    python tools/plot_training.py work_dirs/mask_rcnn_ce_r50 work_dirs/mask_rcnn_r50 \\
        --out training.png
"""
import argparse
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='run', help='work dir of a run')
    parser.add_argument('--out', type=Path, required=True, help='picture to write, such as a .png')
    return parser.parse_args()


def main(arguments):
    from cenet_mmdet.analysis.figures import read_curves, training
    from cenet_mmdet.analysis.report import short_names
    from cenet_mmdet.utils.files import replacing

    curves = [read_curves(run) for run in arguments.runs]
    with replacing(arguments.out) as partial:
        training(dict(zip(short_names(arguments.runs), curves)), partial)


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
