#!/usr/bin/env python3
"""Draw a config's training images with boxes and masks, as the model gets them.

    COCO_ROOT=/data/coco python tools/browse_dataset.py configs/mask_rcnn_ce_r50.py \\
        --output-dir pictures --not-show

The arguments are those of MMDetection's tools/analysis_tools/browse_dataset.py.
"""
import argparse
from pathlib import Path


def parse_args():
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of a config file')
    parser.add_argument('--output-dir', type=Path, metavar='FOLDER',
                        help='write the pictures to this folder')
    parser.add_argument('--not-show', action='store_true', help='open no window')
    parser.add_argument('--show-interval', type=float, default=2, metavar='SECONDS',
                        help='how long each picture is shown (%(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='change settings of the config')
    return parser.parse_args()


def ground_truth(sample):
    """The sample with plain boxes and masks, which the visualizer draws."""
    instances = sample.gt_instances
    if hasattr(instances.get('bboxes'), 'tensor'):
        instances.bboxes = instances.bboxes.tensor
    if 'masks' in instances:
        instances.masks = instances.masks.to_ndarray().astype(bool)
    return sample


def main(arguments):
    from mmdet.registry import DATASETS, VISUALIZERS
    from rich.progress import track

    from cenet_mmdet.engine.data_errors import explain_data_errors
    from cenet_mmdet.models.build import init_scope, load_config

    cfg = load_config(arguments.config, arguments.cfg_options)
    init_scope(cfg)
    with explain_data_errors(cfg):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = dataset.metainfo
    for item in track(dataset, 'drawing', total=len(dataset)):
        name = Path(item['data_samples'].img_path).name
        visualizer.add_datasample(
            name, item['inputs'].flip(0).permute(1, 2, 0).numpy(),
            ground_truth(item['data_samples']), draw_pred=False, show=not arguments.not_show,
            wait_time=arguments.show_interval,
            out_file=str(arguments.output_dir / name) if arguments.output_dir else None)


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
