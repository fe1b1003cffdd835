#!/usr/bin/env bash
# What both images add to their base: tini, which is process 1, and the folder for runs that the user may write.
set -euo pipefail
user=$1

if ! command -v tini >/dev/null; then
    apt-get update --quiet
    apt-get install --yes --quiet --no-install-recommends tini
    rm -rf /var/lib/apt/lists/*
fi
install -d -o "$user" -g "$user" /opt/hft_megatron/runs
