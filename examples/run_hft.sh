#!/usr/bin/env bash
# Starts the ranks of any command of hft-megatron that trains, as the other scripts start theirs, and without a recipe: all
# options are those given here.
#
#   bash examples/run_hft.sh pretrain --load-hf /models/Llama-2-7b-hf --data-path corpus --seq-length 4096 --train-iters 1000
#   bash examples/run_hft.sh sft --config run.yaml --stages stages.yaml
#
# SAVE, PYTHON, GPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and MAX_RESTARTS from the environment, and the exit
# codes, are those of finetune_llama_hft.sh. Without --save, here or in --config, SAVE is both --save and --load.

set -euo pipefail
METHOD=${1:-}
# shellcheck source=examples/start.sh
. "$(dirname "${BASH_SOURCE[0]}")/start.sh"
[[ -n $METHOD && $METHOD != -* ]] || mistake "the command is missing; write bash $0 pretrain OPTIONS, or sft or dpo."
shift
for_help_and_python "$@"
where_it_runs

# What --config says is only known to the command. A mistake in it is said by the check.
ARGS=()
GIVEN=$("$PYTHON" -c "
import sys
from hft_megatron.cli.entry import commands
from hft_megatron.config.loading import load_options
print(load_options(commands()[sys.argv[1]].options, sys.argv[2:]).checkpoint.save or '')
" "$METHOD" "$@" 2>/dev/null || true)
if [[ -n $GIVEN ]]; then
    SAVE=$GIVEN
else
    where_it_saves
    ARGS=(--save "$SAVE" --load "$SAVE")
fi
start_ranks "$@"
