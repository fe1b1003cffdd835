#!/usr/bin/env bash
# Puts the newer line of megatron-core, as constraints/cuda.txt pins it, into a folder of the user's cache and prints the
# folder: in front of PYTHONPATH it takes the place of the older line. Only the first call installs.
#
#   PYTHONPATH=$(.ci/newer-engine.sh) .venv/bin/python -m pytest -m engine
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t PINS < <(grep --extended-regexp '^(megatron-core|triton)==' constraints/cuda.txt)
PYTHON=$(.venv/bin/python -c 'import sys; print(*sys.version_info[:2], sep=".")')
FOLDER=${XDG_CACHE_HOME:-$HOME/.cache}/hft_megatron/engine-$(IFS=+ && echo "${PINS[*]#*==}")-python$PYTHON

if [[ ! -e $FOLDER/complete ]]; then
    rm -rf "$FOLDER"
    # It says that it needs Python 3.12, and its Python files run on 3.11, too.
    .venv/bin/python -m pip install --quiet --no-deps --ignore-requires-python --target "$FOLDER" "${PINS[@]}" >&2
    touch "$FOLDER/complete"
fi
echo "$FOLDER"
