# Shared by the launchers: their usage text, and torchrun from any working directory.
set -euo pipefail
tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}"

# require COUNT "$@": print the script's leading comment unless COUNT arguments are given.
require() {
    local count=$1
    shift
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
        exit 0
    fi
    if (($# < count)); then
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" >&2
        exit 2
    fi
}

# launch PROCESSES SCRIPT ARGUMENTS...
launch() {
    local processes=$1 script=$2
    shift 2
    if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
        echo "$(basename "$0"): the number of GPUs must be a positive integer, got '$processes'" >&2
        exit 2
    fi
    exec torchrun --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" \
        --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
        --nproc-per-node="$processes" "$tools/$script" "$@" --launcher pytorch
}
