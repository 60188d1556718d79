#!/usr/bin/env bash
# Train under Slurm:
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#   GPUS=16 tools/slurm_train.sh gpu ce_r50 configs/mask_rcnn_ce_r50.py work_dirs/ce_r50
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS are taken from the environment.
. "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
require 4 "$@"
if ! command -v srun >/dev/null; then
    echo "slurm_train.sh: srun not found; run it where Slurm is installed, or use dist_train.sh" >&2
    exit 1
fi
# shellcheck disable=SC2086  # SRUN_ARGS holds several words
exec srun --partition="$1" --job-name="$2" \
    --ntasks="${GPUS:-8}" --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --gres="gpu:${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$tools/train.py" "$3" --work-dir="$4" --launcher=slurm "${@:5}"
