#!/usr/bin/env python3
"""Evaluate a detector or a classifier.

    COCO_ROOT=/data/coco python tools/test.py configs/mask_rcnn_ce_r50.py \\
        work_dirs/mask_rcnn_ce_r50/epoch_24.pth --show-dir pictures

The arguments are those of MMDetection's tools/test.py. Without a GPU it runs on the CPU, with
several processes too.
"""
import copy

from cenet_mmdet.engine.cpu_distributed import process_group
from cenet_mmdet.engine.data_errors import explain_data_errors
from cenet_mmdet.engine.run_config import build_runner, run_config, run_parser
from cenet_mmdet.engine.weights import check_checkpoint
from cenet_mmdet.utils.errors import InputError, exit_on_input_error


def parse_args():
    parser = run_parser(__doc__)
    parser.add_argument('checkpoint', help='path of a checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='FOLDER',
                        help='draw the predictions into this folder of WORK_DIR/TIME')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS',
                        help='how long --show shows each (%(default)s)')
    parser.add_argument('--tta', action='store_true',
                        help="test-time augmentation: the config's, or flips")
    return parser.parse_args()


def testing_config(arguments):
    cfg = run_config(arguments)
    check_checkpoint(arguments.checkpoint)
    cfg.load_from = arguments.checkpoint
    cfg.resume = False
    if arguments.out and not arguments.out.endswith(('.pkl', '.pickle')):
        raise InputError(f'--out must end in .pkl or .pickle, got {arguments.out}')
    if arguments.show or arguments.show_dir:
        from mmdet.engine.hooks.utils import trigger_visualization_hook
        cfg = trigger_visualization_hook(cfg, arguments)
    if arguments.tta:
        add_test_time_augmentation(cfg)
    return cfg


def add_test_time_augmentation(cfg):
    """Wrap the model, and give the test data its pipeline."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
            'flip_direction')
    pack = dict(type='PackDetInputs', meta_keys=keys)
    default = [*copy.deepcopy(dataset.pipeline[:-1]),
               dict(type='TestTimeAug', transforms=[flips, [pack]])]
    model = cfg.get('tta_model') or dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    dataset.pipeline = cfg.get('tta_pipeline') or default
    cfg.model = dict(**model, module=cfg.model)


def test(cfg, out):
    runner = build_runner(cfg)
    if out:
        from mmdet.evaluation import DumpDetResults
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=out))
    runner.test()


def main():
    arguments = parse_args()
    cfg = testing_config(arguments)
    with process_group(cfg), explain_data_errors(cfg):
        test(cfg, arguments.out)


if __name__ == '__main__':
    with exit_on_input_error():
        main()
