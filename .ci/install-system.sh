#!/usr/bin/env bash
# Installs from Debian's packages what the tests marked `system` start, and the shells and the browser of other tests. Where
# that cannot be done they skip, with the reason.
set -euo pipefail

PACKAGES=(docker.io docker-compose debootstrap slurm-wlm munge iproute2 zsh fish chromium)

if ! command -v apt-get >/dev/null || [[ $(id -u) != 0 ]]; then
    echo "system tests: nothing is installed, because that takes apt-get and root"
elif dpkg-query --show "${PACKAGES[@]}" >/dev/null 2>&1; then
    echo "system tests: ${PACKAGES[*]} are installed"
elif ! { apt-get update --quiet &&
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "${PACKAGES[@]}"; }; then
    echo "system tests: apt-get failed; what it did not install is missing"
fi
