#!/usr/bin/env python3
"""Evaluate a detector: MMDetection's tools/test.py, after a check of the files it needs.

    COCO_ROOT=/data/coco python tools/test.py configs/mask_rcnn_ce_r50.py \\
        work_dirs/mask_rcnn_ce_r50/epoch_24.pth --show-dir pictures
"""
from _mmdet import asks_for_help, check_files, run_tool

if __name__ == '__main__':
    if not asks_for_help():
        check_files(('test', ), positional=('config', 'checkpoint'))
    run_tool('test.py', __doc__)
