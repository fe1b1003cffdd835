#!/usr/bin/env bash
# Both images start here, below tini: nothing or options are for the example script, other words are a command of their own.
#
#   docker run IMAGE --train-iters 50                        examples/finetune_llama_hft.sh --train-iters 50
#   docker run IMAGE hft-megatron plan ...                   the same without the container
#   docker run IMAGE torchrun --nproc-per-node 8 examples/finetune_llama_hft.sh
#
# WANDB_API_KEY_FILE names a file with the key, such as a mounted secret; `docker inspect` shows what WANDB_API_KEY holds.
set -euo pipefail

if [[ -n ${WANDB_API_KEY_FILE:-} ]]; then
    if [[ ! -r $WANDB_API_KEY_FILE ]]; then
        echo "hft-megatron: error: WANDB_API_KEY_FILE=$WANDB_API_KEY_FILE cannot be read by user $(id -u);" \
            "mount the secret there, readable for that user." >&2
        exit 2
    fi
    WANDB_API_KEY=$(<"$WANDB_API_KEY_FILE")
    export WANDB_API_KEY
fi

case ${1:-} in
    "" | -*) set -- bash /opt/hft_megatron/examples/finetune_llama_hft.sh "$@" ;;
esac
# exec: a signal to tini must reach the command and not a shell that waits for it.
exec "$@"
