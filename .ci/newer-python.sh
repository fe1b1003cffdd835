#!/usr/bin/env bash
# Makes an environment of Python 3.12 with the versions of constraints/cuda.txt in the user's cache, and prints its folder:
# what a GPU container has, on CPU. It takes 5 GB and some minutes, and is made where setup.py, the constraints, the engine's
# seams or the images have changed within sixty commits; otherwise one that is there is used, or nothing is printed.
#
#   PYTHONPATH=. "$(.ci/newer-python.sh)/bin/python" -m pytest tests/docker/test_gpu_python.py
set -euo pipefail
cd "$(dirname "$0")/.."

# A shim of pyenv's may be there that starts nothing; the interpreters are below it.
NEWER=
for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
    if "$candidate" -c "" 2>/dev/null; then
        NEWER=$candidate
        break
    fi
done
if [[ -z $NEWER ]]; then
    echo "Python 3.12: not tested, there is no python3.12 here" >&2
    exit
fi
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/hft_megatron
DIGEST=$({ "$NEWER" --version && cat setup.py constraints/cuda.txt; } | sha256sum | head --bytes 12)
FOLDER=$CACHE/python3.12-$DIGEST

if [[ ! -e $FOLDER/complete ]]; then
    if ! git rev-parse --quiet --verify HEAD~60 >/dev/null; then
        echo "Python 3.12: this clone does not say what has changed within sixty commits, so it is tested" >&2
    elif git diff --quiet HEAD~60 -- setup.py constraints hft_megatron/engine docker; then
        echo "Python 3.12: not tested, nothing that concerns it has changed and $FOLDER is not there" >&2
        exit
    fi
    rm -rf "$CACHE"/python3.12-*
    "$NEWER" -m venv "$FOLDER"
    "$FOLDER/bin/python" -m pip install --quiet --constraint constraints/cuda.txt setuptools >&2
    # Of a copy, because pip leaves a build folder. The code that is run is that of the folder which PYTHONPATH names.
    COPY=$(mktemp --directory)
    trap 'rm -rf "$COPY"' EXIT
    git archive HEAD | tar --extract --directory "$COPY"
    "$FOLDER/bin/python" -m pip install --quiet --constraint constraints/cuda.txt --no-build-isolation "${COPY}[dev]" >&2
    touch "$FOLDER/complete"
fi
echo "$FOLDER"
