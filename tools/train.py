#!/usr/bin/env python3
"""Train a detector or a classifier.

    COCO_ROOT=/data/coco CE_RESNET50_CHECKPOINT=ce_resnet50.pth \\
        python tools/train.py configs/mask_rcnn_ce_r50.py --amp

The arguments are those of MMDetection's tools/train.py. Without a GPU it runs on the CPU, with
several processes too.
"""
from cenet_mmdet.checkpoint.resumable import check_resumable, last_checkpoint
from cenet_mmdet.engine.cpu_distributed import process_group
from cenet_mmdet.engine.data_errors import explain_data_errors
from cenet_mmdet.engine.run_config import build_runner, run_config, run_parser
from cenet_mmdet.utils.errors import InputError, exit_on_input_error


def parse_args():
    parser = run_parser(__doc__)
    parser.add_argument('--amp', action='store_true', help='mixed precision; needs a GPU')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate with the number of images in a step, from "
                             "the config's base_batch_size")
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or from the last one in the work dir')
    return parser.parse_args()


def training_config(arguments):
    cfg = run_config(arguments)
    if arguments.amp:
        from mmengine.device import get_device

        if get_device() == 'cpu':
            raise InputError("--amp needs a GPU: MMCV's operators compute in float32 on CPUs. "
                             'Leave it out.')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if arguments.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise InputError(f'--auto-scale-lr: {arguments.config} does not say for how many '
                             'images its learning rate is meant. Add '
                             'auto_scale_lr = dict(base_batch_size=16) to it.')
        cfg.auto_scale_lr.enable = True
    if arguments.resume:
        cfg.load_from = (last_checkpoint(cfg.work_dir) if arguments.resume == 'auto'
                         else arguments.resume)
        cfg.resume = cfg.load_from is not None
        if cfg.resume:
            check_resumable(cfg.load_from)
    return cfg


def main():
    cfg = training_config(parse_args())
    with process_group(cfg), explain_data_errors(cfg):
        build_runner(cfg).train()


if __name__ == '__main__':
    with exit_on_input_error():
        main()
