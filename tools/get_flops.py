#!/usr/bin/env python3
"""Count parameters and operations of a detector: MMDetection's get_flops.py.

    COCO_ROOT=/data/coco python tools/get_flops.py configs/mask_rcnn_ce_r50.py --num-images 10

Needs validation images, no weights. Operations are averaged over the images.
"""
import sys

from _mmdet import asks_for_help, check_files, run_tool

if __name__ == '__main__':
    if not asks_for_help():
        cfg = check_files(('val', ))
        if cfg.model.backbone.type == 'CEResNet':
            # Frozen CE layers refuse to run on unset statistics; here only sizes count.
            if '--cfg-options' not in sys.argv:
                sys.argv.append('--cfg-options')
            at = sys.argv.index('--cfg-options') + 1
            sys.argv[at:at] = ['model.backbone.allow_unset=True']
    run_tool('analysis_tools/get_flops.py', __doc__)
