#!/usr/bin/env bash
# Evaluate on several GPUs:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
#   tools/dist_test.sh configs/mask_rcnn_ce_r50.py work_dirs/mask_rcnn_ce_r50/epoch_24.pth 8
# On several machines, run it on each with NNODES, NODE_RANK and MASTER_ADDR set.
. "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
require 3 "$@"
launch "$3" test.py "$1" "$2" "${@:4}"
