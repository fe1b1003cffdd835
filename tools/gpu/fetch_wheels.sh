#!/usr/bin/env bash
# Puts the wheels that a bare GPU machine lacks into tools/gpu/wheels/, which git ignores: a few megabytes, for Python 3.12 on
# Linux. Run it where there is a network and copy them with the checkout; acceptance.py installs from there.
set -euo pipefail
cd "$(dirname "$0")"

python3 -m pip download --no-deps --only-binary=:all: --dest wheels --quiet \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
    megatron-core==0.19.2 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.0
ls -l wheels
