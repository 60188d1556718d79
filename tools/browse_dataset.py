#!/usr/bin/env python3
"""Draw a config's training images with boxes and masks: MMDetection's browse_dataset.py.

    COCO_ROOT=/data/coco python tools/browse_dataset.py configs/mask_rcnn_ce_r50.py \\
        --output-dir pictures --not-show
"""
from _mmdet import asks_for_help, check_files, run_tool

if __name__ == '__main__':
    if not asks_for_help():
        check_files(('train', ))
    run_tool('analysis_tools/browse_dataset.py', __doc__)
