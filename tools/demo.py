#!/usr/bin/env python3
"""The whole job at a small scale, on a CPU: generate data, train, evaluate, draw.

    python tools/demo.py
    python tools/demo.py --seed 2 --work-dir work_dirs/demo_seed2

Trains configs/demo/mask_rcnn_ce_r18_shapes.py, a slim CE-ResNet-18 Mask R-CNN,
from scratch on generated shapes, and leaves in the work dir a checkpoint,
curves.png, pictures/ with ground truth beside prediction, and in channels/ a
report on the network's channels.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes.py'
PICTURES = 12
SCORE = 0.5  # predictions below are not drawn


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('data/demo'),
                        help='where the generated set is, or goes (%(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'),
                        help='where results go (%(default)s)')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the initial weights and the order of images (%(default)s)')
    parser.add_argument('--train-images', type=int, default=640, help='(%(default)s)')
    parser.add_argument('--val-images', type=int, default=120, help='(%(default)s)')
    parser.add_argument('--epochs', type=int, help="instead of the config's")
    return parser.parse_args()


def build_runner(arguments):
    from mmengine.config import Config
    from mmengine.runner import Runner

    os.environ.update(COCO_ROOT=str(arguments.data.absolute()), COCO_YEAR='2017')
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = str(arguments.work_dir)
    cfg.randomness = dict(seed=arguments.seed)
    if arguments.epochs:
        cfg.train_cfg.max_epochs = arguments.epochs
        cfg.param_scheduler[-1].T_max = arguments.epochs
    return Runner.from_cfg(cfg)


def read_scalars(runner):
    """Training losses and validation results of this run, as MMEngine logged them."""
    path = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return ([r for r in records if 'loss' in r], [r for r in records if 'coco/bbox_mAP' in r])


def draw_curves(losses, results, path):
    """Loss by iteration and average precision by epoch, side by side."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    steps = [r['step'] for r in losses]
    for key, label in (('loss', 'total'), ('loss_cls', 'class'), ('loss_bbox', 'box'),
                       ('loss_mask', 'mask'), ('loss_rpn_cls', 'RPN')):
        left.plot(steps, [r[key] for r in losses], label=label)
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    epochs = [r['step'] for r in results]
    for key, label in (('segm_mAP_50', 'mask AP50'), ('bbox_mAP_50', 'box AP50'),
                       ('segm_mAP', 'mask AP'), ('bbox_mAP', 'box AP')):
        right.plot(epochs, [r[f'coco/{key}'] for r in results], marker='o', label=label)
    right.set(xlabel='epoch', ylabel='held-out average precision', ylim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_pictures(runner, folder):
    """Ground truth beside prediction for evenly spaced held-out images, and all on one sheet."""
    import mmcv
    import numpy as np
    import torch
    from mmengine.dataset import pseudo_collate

    dataset = runner.val_dataloader.dataset
    runner.visualizer.dataset_meta = dataset.metainfo
    runner.model.eval()
    drawn = []
    for index in range(0, len(dataset), max(1, len(dataset) // PICTURES))[:PICTURES]:
        with torch.no_grad():
            sample, = runner.model.test_step(pseudo_collate([dataset[index]]))
        path = Path(sample.img_path)
        runner.visualizer.add_datasample(
            path.stem, mmcv.imread(path, channel_order='rgb'), sample, pred_score_thr=SCORE,
            out_file=str(folder / f'{path.stem}.png'))
        drawn.append(mmcv.imread(folder / f'{path.stem}.png'))
    drawn += [np.full_like(drawn[0], 255)] * (len(drawn) % 2)
    rows = [np.hstack(drawn[i:i + 2]) for i in range(0, len(drawn), 2)]
    mmcv.imwrite(np.vstack(rows), str(folder.with_suffix('.png')))


def report_channels(runner, work_dir):
    """What tools/analyze_channels.py says of the model, in a process of its own."""
    checkpoint = work_dir / f'epoch_{runner.max_epochs}.pth'
    command = [sys.executable, str(ROOT / 'tools' / 'analyze_channels.py'), str(CONFIG),
               str(checkpoint), '--out', str(work_dir / 'channels'), '--images', '48']
    if subprocess.run(command).returncode:
        sys.exit(f'the report on the channels failed: {" ".join(command)}')


def print_summary(runner, results, seconds, work_dir):
    from rich.console import Console
    from rich.table import Table

    last = results[-1]
    table = Table(title=f'CE-ResNet-18 Mask R-CNN, {len(runner.val_dataloader.dataset)} held-out '
                  f'images, {seconds / 60:.1f} minutes')
    for column in ('', 'AP', 'AP50', 'AP75', 'small', 'medium', 'large'):
        table.add_column(column, justify='right' if column else 'left')
    suffixes = '', '_50', '_75', '_s', '_m', '_l'
    for key, name in (('bbox', 'box'), ('segm', 'mask')):
        table.add_row(name, *(f'{100 * last[f"coco/{key}_mAP{suffix}"]:.1f}'
                              for suffix in suffixes))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f'checkpoint       {work_dir}/epoch_{runner.max_epochs}.pth\n'
                  f'training curves  {work_dir}/curves.png\n'
                  f'pictures         {work_dir}/pictures.png (ground truth left, prediction '
                  f'right; one by one in {work_dir}/pictures/)\n'
                  f'channels         {work_dir}/channels/report.html\n'
                  f'log              {runner.log_dir}', highlight=False)


def main():
    arguments = parse_args()
    start = time.time()
    # after the parsing, so that --help answers at once
    from dev.make_demo_data import generate

    generate(arguments.data, arguments.train_images, arguments.val_images, seed=0)
    runner = build_runner(arguments)
    runner.train()
    losses, results = read_scalars(runner)
    work_dir = arguments.work_dir.absolute()
    draw_curves(losses, results, work_dir / 'curves.png')
    draw_pictures(runner, work_dir / 'pictures')
    report_channels(runner, work_dir)
    print_summary(runner, results, time.time() - start, work_dir)


if __name__ == '__main__':
    main()
