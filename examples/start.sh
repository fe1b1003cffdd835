# Shared parts of the example scripts: the place, inputs and end of a run. A script sources this file, calls
# read_environment, sets ARGS (the options, without those that its caller gave) and calls start_run:
#
#   METHOD         the command of hft-megatron
#   DEMO_DATA      the file of runs/demo that it trains on where nothing is named
#
# run_hft.sh, which has no recipe, calls the parts of these.
#
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
# The package beside the scripts, installed or not, from whatever folder they are called.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Not RANK: job controllers set that for nodes as well.
under_torchrun() { [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; }

mistake() { # SENTENCE
    if under_torchrun && [[ ${RANK:-0} != 0 ]]; then
        # Rank 0 reports the same; torchrun would kill it in the middle if this one left at once.
        sleep 2
    else
        echo "hft-megatron: error: $1" >&2
    fi
    exit 2
}

# The command line's value of --NAME: the last one among WORDS, or DEFAULT.
last_value() { # NAME DEFAULT WORDS...
    local name=$1 value=$2
    shift 2
    while (($# > 0)); do
        case ${1//_/-} in
            "--$name") value=${2:-} ;;
            "--$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf "%s" "$value"
}

is_given() { # NAME WORDS...
    [[ -n $(last_value "$1" "" "${@:2}") ]]
}

# Sets RANKS, TP, PP, MODEL, DATA, SAVE and IS_DEMO (yes or no) from the environment and the words of the command line.
read_environment() { # WORDS...
    for_help_and_python "$@"
    without_config "$@"
    where_it_runs
    what_it_trains "$@"
}

for_help_and_python() { # WORDS...
    local word
    for word in "$@"; do
        if [[ $word == -h || $word == --help || $word == --help-all ]]; then
            exec "$PYTHON" -m hft_megatron "$METHOD" "$word"
        fi
    done
    if ! "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)" 2>/dev/null; then
        mistake "PYTHON=$PYTHON does not run a Python that has torch; run make install and source .venv/bin/activate."
    fi
}

# A recipe's options stand on the command line, where they would silently override a file's.
without_config() { # WORDS...
    local config
    config=$(last_value config "" "$@")
    [[ -z $config ]] || mistake "--config $config: the options of this script would override the file's; start it with\
 bash examples/run_hft.sh $METHOD --config $config, which adds none."
}

where_it_runs() {
    if under_torchrun; then
        NNODES=$GROUP_WORLD_SIZE
        RANKS=$WORLD_SIZE
    else
        GPUS_PER_NODE=${GPUS_PER_NODE:-$("$PYTHON" -c "import torch; print(torch.cuda.device_count() or 2)")}
        NNODES=${NNODES:-1}
        NODE_RANK=${NODE_RANK:-0}
        MAX_RESTARTS=${MAX_RESTARTS:-0}
        for name in GPUS_PER_NODE NNODES; do
            [[ ${!name} =~ ^[1-9][0-9]*$ ]] || mistake "$name=${!name} must be a whole number above 0."
        done
        [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || mistake "MAX_RESTARTS=$MAX_RESTARTS must be a whole number."
        [[ $NODE_RANK =~ ^[0-9]+$ ]] || mistake "NODE_RANK=$NODE_RANK must be a whole number from 0 to NNODES - 1."
        RANKS=$((NNODES * GPUS_PER_NODE))
    fi
    TP=${TP:-$((RANKS < 2 ? 1 : 2))}
    PP=${PP:-1}
}

what_it_trains() { # WORDS...
    MODEL=$(last_value load-hf "${MODEL:-}" "$@")
    DATA=$(last_value train-data-path "${DATA:-}" "$@")
    SAVE=$(last_value save "${SAVE:-}" "$@")
    if [[ -n $MODEL && -z $DATA ]]; then
        mistake "MODEL=$MODEL is given without DATA; give the data file as DATA, or neither to use the demo's."
    elif [[ -z $MODEL && -n $DATA ]]; then
        mistake "DATA=$DATA is given without MODEL; give the Hugging Face folder as MODEL, or neither to use the demo's."
    fi

    where_it_saves

    # shellcheck disable=SC2034  # the scripts read it
    IS_DEMO=no
    if [[ -z $MODEL ]]; then
        # Every local rank calls this: one makes the folder, the others wait for its lock, and one says so.
        if [[ ${LOCAL_RANK:-0} != 0 ]]; then
            "$PYTHON" "$ROOT/tools/demo/prepare.py" --output "$ROOT/runs/demo" >/dev/null
        else
            "$PYTHON" "$ROOT/tools/demo/prepare.py" --output "$ROOT/runs/demo"
        fi
        MODEL=$ROOT/runs/demo/model
        DATA=$ROOT/runs/demo/$DEMO_DATA
        # shellcheck disable=SC2034
        IS_DEMO=yes
    fi
}

where_it_saves() {
    if [[ -z ${SAVE:-} && $NNODES != 1 ]]; then
        mistake "SAVE is not set on $NNODES nodes; set it to one folder that all of them see."
    elif [[ -z ${SAVE:-} ]]; then
        SAVE=$ROOT/runs/$METHOD-$(date +%Y%m%d-%H%M%S)-$$
        if under_torchrun; then
            # The ranks are processes of one torchrun and must take one folder: the first name to be linked counts.
            shared=${TORCHELASTIC_ERROR_FILE:-}
            [[ $shared == */attempt_* ]] || mistake "SAVE is not set, and torchrun has no log folder to agree on one; set SAVE."
            shared=${shared%/attempt_*}
            mine=$(mktemp "$shared/save-XXXXXX")
            echo "$SAVE" >"$mine"
            ln "$mine" "$shared/save" 2>/dev/null || true
            SAVE=$(<"$shared/save")
        fi
    fi
}

# Ends torchrun where it has started no rank after the time that ranks wait for each other: its own wait is twice as long
# where node 0 is missing, and does not name the endpoint.
give_up_the_start() { # TORCHRUN MINUTES SECONDS
    local children=/proc/$1/task/$1/children until=$((SECONDS + $3))
    while ((SECONDS < until)); do
        # A pause without a process, which would outlive the script.
        read -r -t 2 <> <(:) || true
        # It has started ranks, or has ended, or the kernel doesn't tell.
        [[ -r $children && -z $(<"$children") ]] || return 0
    done
    echo "hft-megatron: error: the $NNODES nodes did not all meet at the rendezvous endpoint $MASTER_ADDR:${MASTER_PORT:-29500} within --distributed-timeout-minutes $2; check that host, the network to it, and the logs of the other nodes" >&2
    kill -s KILL "$1"
}

# Starts ARGS and the command line's words, which override them, on all ranks, with an export; exits with the run's code.
start_run() { # WORDS...
    local unit length
    # A finished run that is started again keeps its export; with another length it gets another.
    EXPORT=$SAVE/hf_iter_$(last_value train-iters "" "${ARGS[@]}" "$@")
    for unit in epoch sample; do
        length=$(last_value "train-${unit}s" "" "$@")
        [[ -z $length ]] || EXPORT=$SAVE/hf_${unit}_$length
    done
    # With exports during training the folder exists before the last one, and the run itself checks whose it is.
    [[ -e $EXPORT && -z $(last_value save-hf-interval "" "$@") ]] || ARGS+=(--save-hf "$EXPORT")
    start_ranks "$@"
}

# The same without an export, which the words may still add.
start_ranks() { # WORDS...
    ARGS+=("$@")

    # Tensor parallelism hides its communication behind products only if kernels start in the order they were queued.
    export CUDA_DEVICE_MAX_CONNECTIONS=1

    if under_torchrun; then
        exec "$PYTHON" -m hft_megatron "$METHOD" "${ARGS[@]}"
    fi

    # Until the ranks can save there is nothing to lose: a signal ends the script, and a restart starts from scratch.
    stop_early() { # SIGNAL CODE
        [[ -z ${CHECK:-} ]] || kill -s KILL "$CHECK" 2>/dev/null || true
        echo "hft-megatron: $1 stopped the run before training began; run it again with SAVE=$SAVE" >&2
        exit "$2"
    }
    trap 'stop_early SIGTERM 3' TERM HUP
    trap 'stop_early SIGUSR1 3' USR1
    trap 'stop_early SIGINT 130' INT

    # A process group of its own (set -m), here and below: Ctrl-C then reaches it from the traps alone, and not a second time
    # from the terminal. In the background: bash would run a trap only when it has ended.
    set -m
    WORLD_SIZE=$RANKS "$PYTHON" -m hft_megatron "$METHOD" --check "${ARGS[@]}" </dev/null &
    CHECK=$!
    set +m
    wait "$CHECK"
    CHECK=
    local word
    for word in "$@"; do
        [[ $word != --check ]] || exit 0
    done
    mkdir -p "$SAVE" || mistake "SAVE=$SAVE cannot be made; choose a folder that can be written."

    if ((NNODES == 1)); then
        # A free port, so that several runs fit on one machine, and no name that a machine without a network cannot resolve.
        RENDEZVOUS_ARGS=(--rdzv-backend c10d --rdzv-endpoint localhost:0 --local-addr localhost)
    else
        [[ -n ${MASTER_ADDR:-} ]] || mistake "MASTER_ADDR is not set on $NNODES nodes; set it to the address of node 0."
        RENDEZVOUS_ARGS=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
        # How long torchrun waits for the other nodes, in whole seconds: as long as the ranks wait for each other.
        limit=$("$PYTHON" -c "
import math, sys
from hft_megatron.cli.entry import commands
from hft_megatron.config.loading import load_options
minutes = load_options(commands()[sys.argv[1]].options, sys.argv[2:]).parallel.distributed_timeout_minutes
print(f'{minutes:g}', math.ceil(60 * minutes))
" "$METHOD" "${ARGS[@]}")
        read -r minutes seconds <<<"$limit"
        RENDEZVOUS_ARGS+=(--rdzv-conf "timeout=$seconds")
    fi
    DISTRIBUTED_ARGS=(
        --signals-to-handle "SIGTERM,SIGINT,SIGUSR1"
        --nproc-per-node "$GPUS_PER_NODE"
        --nnodes "$NNODES"
        --max-restarts "$MAX_RESTARTS"
        "${RENDEZVOUS_ARGS[@]}"
    )

    CORES_PER_RANK=$(($(nproc) / GPUS_PER_NODE))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES_PER_RANK < 1 ? 1 : CORES_PER_RANK))}
    if ((NNODES > 1 || MAX_RESTARTS > 0)); then
        # When ranks are restarted after a crash, a store shared with the agent makes them meet old addresses; recovery
        # then fails about half of the time on gloo. Elsewhere it is shared: a port of their own may be taken by the time
        # that rank 0 listens.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    fi
    # A stopped run writes its checkpoint before it leaves, which may take longer than torchrun's 30 seconds.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

    # This file tells how the run ended; an old one must not tell it of this run.
    STATUS=$SAVE/status.json
    ((NODE_RANK != 0)) || rm -f "$STATUS"

    # A second Ctrl-C would end the ranks while they save.
    set -m
    "$PYTHON" -m hft_megatron.parallel.start_ranks "${DISTRIBUTED_ARGS[@]}" -m hft_megatron "$METHOD" "${ARGS[@]}" </dev/null &
    TORCHRUN=$!
    set +m
    if ((NNODES > 1)); then
        give_up_the_start "$TORCHRUN" "$minutes" "$seconds" &
        GIVING_UP=$!
    fi
    # shellcheck disable=SC2329  # the traps below call it
    forward() { # SIGNAL
        forwarded=yes
        signalled=$1
        kill -s "$1" "$TORCHRUN" 2>/dev/null || true
    }
    trap 'forward TERM' TERM HUP
    trap 'forward INT' INT
    trap 'forward USR1' USR1

    forwarded=yes
    while [[ $forwarded == yes ]]; do
        # A trapped signal ends wait early, with its own number.
        forwarded=no
        code=0
        wait "$TORCHRUN" || code=$?
    done
    [[ -z ${GIVING_UP:-} ]] || kill "$GIVING_UP" 2>/dev/null || true
    if ((code > 128 && code != 130)); then
        # It was killed, or a signal met it before it listened.
        [[ -z ${signalled:-} ]] || stop_early "SIG$signalled" 3
        code=1
    fi
    if ((code == 1 && NODE_RANK == 0)) && [[ -f $STATUS ]]; then
        # Where a rank of another node had a reason, of which those here know only that it is gone, the file has it.
        code=$("$PYTHON" -c "
import json, sys
status = json.load(open(sys.argv[1]))
if status['exit_code'] > 1:
    print('hft-megatron:', status['message'], file=sys.stderr)
print(status['exit_code'] or 1)
" "$STATUS")
    fi
    exit "$code"
}
