#!/usr/bin/env bash
''':'
# Teaches a LLaMA (a Hugging Face folder) the tasks of TRACE one after the other, another half of its matrices in each, and
# evaluates it on the tasks learned so far after each: SAVE/matrix.json, the predictions, and the last model in SAVE/hf.
# Both of these work, on GPUs and on a machine without one:
#
#   MODEL=/models/Llama-2-7b-chat-hf DATA=/data/TRACE-Benchmark bash examples/trace_llama_hft.sh
#   MODEL=/models/Llama-2-7b-chat-hf DATA=/data/TRACE-Benchmark TP=2 PP=2 torchrun --nproc-per-node 8 examples/trace_llama_hft.sh
#
# Order, epochs, batch and rate are those of TRACE, which the command knows. Options after the name go to
# `hft-megatron continual` and override those below; --help-all lists them. From the environment:
#
#   MODEL, DATA    what to train, and the folder of TRACE, with a folder for each task; or a YAML list of tasks
#   SAVE           folder of the sequence, which a second start resumes; without it every start gets a new one in runs/
#   TP, PP         tensor- and pipeline-parallel size (TP: 2, or 1 on a single rank; PP: 1)
#   PYTHON         the interpreter (python)
#   GPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    as in Megatron, where bash starts the ranks
#   MAX_RESTARTS   how often ranks that died are started again from the newest checkpoint, where bash starts them (0)
#
# Under bash: exit code 0 finished, 1 failed, 2 a mistake to correct, 3 stopped by a signal, a time limit or --exit-interval
# (run it again with the same SAVE), 130 stopped by Ctrl-C before training began. torchrun reports 1 whatever happened.
#
# torchrun runs this file with Python, for which the shell half is one string: keep triple quotes and backslashes out.

set -euo pipefail
METHOD=continual
# shellcheck source=examples/start.sh
. "$(dirname "${BASH_SOURCE[0]}")/start.sh"
for_help_and_python "$@"
without_config "$@"
where_it_runs
MODEL=$(last_value load-hf "${MODEL:-}" "$@")
DATA=$(last_value continual-tasks "${DATA:-}" "$@")
SAVE=$(last_value save "${SAVE:-}" "$@")
[[ -n $MODEL ]] || mistake "MODEL is not set; give the Hugging Face folder of the model as MODEL."
[[ -n $DATA ]] || mistake "DATA is not set; give the folder of TRACE, or a YAML list of tasks, as DATA."
where_it_saves

MODEL_ARGS=(
    --load-hf "$MODEL"
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)

# What TRACE trains with beside its epochs, batch and rate: a constant rate without a warm-up.
TRAINING_ARGS=(
    --micro-batch-size 1
    --lr-decay-style constant
    --adam-beta2 0.95
    --weight-decay 0.0
    --clip-grad 1.0
    --seed 1234
)

# Examples longer than the model reads are left out, and counted in the log.
DATA_ARGS=(
    --continual-tasks "$DATA"
    --long-examples drop
)

HFT_ARGS=(
    --hft-ratio 0.5
)

EVAL_AND_LOGGING_ARGS=(
    --continual-batch-size 16
    --log-interval 10
    --save "$SAVE"
    --load "$SAVE"
    --save-interval 100
    --keep-last 1
)

ARGS=(
    "${MODEL_ARGS[@]}"
    "${MODEL_PARALLEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${HFT_ARGS[@]}"
    "${EVAL_AND_LOGGING_ARGS[@]}"
)

# A finished sequence that is started again keeps its export.
[[ -e $SAVE/hf ]] || ARGS+=(--save-hf "$SAVE/hf")

# The rest is Python's, and a here-document for bash, so that shellcheck can read this file.
start_ranks "$@" <<"pass"
'''
import os
import sys

os.environ.setdefault("PYTHON", sys.executable)
os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
pass
