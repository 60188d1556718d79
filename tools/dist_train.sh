#!/usr/bin/env bash
# Train on several GPUs:
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#   tools/dist_train.sh configs/mask_rcnn_ce_r50.py 8 --amp
# On several machines, run it on each with NNODES, NODE_RANK and MASTER_ADDR set.
. "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
require 2 "$@"
launch "$2" train.py "$1" "${@:3}"
