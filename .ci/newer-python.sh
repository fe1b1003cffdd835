#!/usr/bin/env bash
# Makes an environment of Python 3.12 with the versions of constraints/cuda.txt in the user's cache, and prints its folder:
# what a GPU container has, on CPU. It takes 5 GB and some minutes, and is made where setup.py, the constraints, the engine's
# seams or the images have changed within twenty commits; otherwise one that is there is used, or nothing is printed.
#
#   PYTHONPATH=. "$(.ci/newer-python.sh)/bin/python" -m pytest tests/docker/test_gpu_python.py
set -euo pipefail
cd "$(dirname "$0")/.."

if ! NEWER=$(command -v python3.12); then
    echo "Python 3.12: not tested, there is no python3.12 here" >&2
    exit
fi
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/hft_megatron
DIGEST=$({ "$NEWER" --version && cat setup.py constraints/cuda.txt; } | sha256sum | head --bytes 12)
FOLDER=$CACHE/python3.12-$DIGEST

if [[ ! -e $FOLDER/complete ]]; then
    if git diff --quiet HEAD~20 -- setup.py constraints hft_megatron/engine docker 2>/dev/null; then
        echo "Python 3.12: not tested, nothing that concerns it has changed and $FOLDER is not there" >&2
        exit
    fi
    rm -rf "$CACHE"/python3.12-*
    "$NEWER" -m venv "$FOLDER"
    "$FOLDER/bin/python" -m pip install --quiet --constraint constraints/cuda.txt setuptools >&2
    # The package itself comes from the folder that PYTHONPATH names.
    "$FOLDER/bin/python" -m pip install --quiet --constraint constraints/cuda.txt --no-build-isolation '.[dev]' >&2
    touch "$FOLDER/complete"
fi
echo "$FOLDER"
