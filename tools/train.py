#!/usr/bin/env python3
"""Train a detector: MMDetection's tools/train.py, after a check of the files it needs.

    COCO_ROOT=/data/coco CE_RESNET50_CHECKPOINT=ce_resnet50.pth \\
        python tools/train.py configs/mask_rcnn_ce_r50.py --amp
"""
from _mmdet import asks_for_help, check_files, run_tool

if __name__ == '__main__':
    if not asks_for_help():
        check_files(('train', 'val'))
    run_tool('train.py', __doc__)
