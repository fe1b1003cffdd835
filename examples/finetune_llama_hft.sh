#!/usr/bin/env bash
''':'
# Half fine-tunes a LLaMA (a Hugging Face folder) on conversations (a data file) and exports it to a Hugging Face folder.
# All of these work, on GPUs and on a machine without one:
#
#   bash examples/finetune_llama_hft.sh
#   torchrun --nproc-per-node 4 examples/finetune_llama_hft.sh --train-iters 50
#   torchrun --no-python examples/finetune_llama_hft.sh
#   MODEL=/models/Llama-2-7b-hf DATA=train.jsonl TP=2 PP=2 torchrun --nproc-per-node 8 examples/finetune_llama_hft.sh
#
# Options after the name go to `hft-megatron sft` and override those below; --help-all lists them. From the environment:
#
#   MODEL, DATA    what to train and on what; without both, the small model and data of the demo, made first if need be
#   SAVE           folder of the run, which a second start resumes; without it every start gets a new one in runs/
#   TP, PP         tensor- and pipeline-parallel size (TP: 2, or 1 on a single rank; PP: 1)
#   PYTHON         the interpreter (python)
#   GPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    as in Megatron, where bash starts the ranks
#   MAX_RESTARTS   how often ranks that died are started again from the newest checkpoint, where bash starts them (0)
#
# Under bash: exit code 0 finished, 1 failed, 2 a mistake to correct, 3 stopped by a signal, a time limit or --exit-interval
# (run it again with the same SAVE), 130 stopped by Ctrl-C before training began; what stops it in the last iteration, or
# later, lets it finish. torchrun reports 1 whatever happened, also of a run that has finished although a signal came.
#
# torchrun runs this file with Python, for which the shell half is one string: keep triple quotes and backslashes out.

set -euo pipefail
METHOD=sft
DEMO_DATA=train.jsonl
# shellcheck source=examples/start.sh
. "$(dirname "${BASH_SOURCE[0]}")/start.sh"
read_environment "$@"

MODEL_ARGS=(
    --load-hf "$MODEL"
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)

# Batch, rate and schedule of Tulu 2.
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 128
    --lr 2e-5
    --lr-decay-style linear
    --weight-decay 0.0
    --clip-grad 1.0
    --seed 1234
)

DATA_ARGS=(
    --train-data-path "$DATA"
)

DEMO_ARGS=()
TRAIN_ITERS=1000
if [[ $IS_DEMO == yes ]]; then
    # A model of a few million parameters needs another pace than the LLaMAs that TRAINING_ARGS is for.
    DEMO_ARGS=(
        --micro-batch-size 8
        --global-batch-size 32
        --seq-length 64
        --lr 5e-4
    )
    TRAIN_ITERS=200
fi

# A length or a warm-up in another unit after the script's name takes the place of these.
LENGTH_ARGS=(--train-iters "$TRAIN_ITERS")
if is_given train-epochs "$@" || is_given train-samples "$@"; then LENGTH_ARGS=(); fi
WARMUP_ARGS=(--lr-warmup-fraction 0.03)
if is_given lr-warmup-iters "$@" || is_given lr-warmup-samples "$@"; then WARMUP_ARGS=(); fi

HFT_ARGS=(
    --hft-ratio 0.5
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 10
    --save "$SAVE"
    --load "$SAVE"
    --save-interval 100
)

ARGS=(
    "${MODEL_ARGS[@]}"
    "${MODEL_PARALLEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${LENGTH_ARGS[@]}"
    "${WARMUP_ARGS[@]}"
    "${HFT_ARGS[@]}"
    "${EVAL_AND_LOGGING_ARGS[@]}"
    "${DEMO_ARGS[@]}"
)

# The rest is Python's, and a here-document for bash, so that shellcheck can read this file.
start_run "$@" <<"pass"
'''
import os
import sys

os.environ.setdefault("PYTHON", sys.executable)
os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
pass
