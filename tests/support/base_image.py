"""Inputs of image builds where no registry can be reached: a base image made on the spot, and a folder of wheels.

Both come from the machine's own package sources, by the configurations of its apt and its pip, and are kept with
the engine's data, under names that change with their inputs.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.engine import CLIENT, Engine
from tests.support.ranks import REPOSITORY

PACKAGES = "python3,python3-venv,ca-certificates"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def base_image(engine: Engine) -> str:
    """The name of an image with this machine's distribution and Python, made with the mirror that its apt uses."""
    root = engine.folder / "rootfs"
    wanted = ["apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Identifier: Packages"]
    known = subprocess.run(wanted, capture_output=True, text=True, check=True).stdout.splitlines()
    if not known:
        pytest.skip("apt knows no mirror that a base image could be made from; run apt-get update")
    suite, mirror = known[0].split()
    name = f"localhost/python-base:{_digest(suite, mirror, PACKAGES, VERSION)}"
    if engine.has(name):
        return name
    done = subprocess.run(
        ["timeout", "600", "debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(root), mirror],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"no base image can be made: debootstrap says {done.stdout[-500:]}")
    if not (root / f"usr/bin/python{VERSION}").exists():
        pytest.skip(f"{suite}'s Python is not {VERSION}, which the wheels are for")
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as archive:
        words = [CLIENT, "--host", engine.address, "import", "-", name]
        subprocess.run(words, stdin=archive.stdout, stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(root)
    return name


def wheels_for_builds(engine: Engine) -> Path:
    """A folder of the pinned wheels, with this environment's build of torch: another one could be the GPUs'."""
    pins = [(REPOSITORY / name).read_text() for name in ("constraints/cpu.txt", "setup.py", "pyproject.toml")]
    kept = engine.kept / f"wheels-{_digest(*pins, torch.__version__, VERSION)}"
    if kept.exists():
        return kept
    for old in engine.kept.glob("wheels*"):
        shutil.rmtree(old)
    folder = engine.kept / "wheels"
    words = ["--constraint", "constraints/cpu.txt", "--no-build-isolation", "--prefer-binary", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), *words]
    done = subprocess.run(
        [*command, "setuptools", f"torch=={torch.__version__}", ".[formats]"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        pytest.skip(f"pip cannot get the pinned wheels: {done.stderr[-500:]}")
    # Under this name it is complete.
    return folder.rename(kept)


def _digest(*inputs: str) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]
