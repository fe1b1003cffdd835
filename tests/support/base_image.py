"""What an image is built from where no registry can be reached: a base image made on the spot, and a folder of wheels.

Both come from where the machine gets its own packages, by the configurations of its apt and its pip.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.engine import CLIENT, Engine
from tests.support.ranks import REPOSITORY

PYTHON_BASE = "localhost/python-base"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"


def import_base(engine: Engine) -> None:
    """Makes ``PYTHON_BASE`` of this machine's distribution, with the mirror that its apt uses."""
    root = engine.folder / "rootfs"
    wanted = ["apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Identifier: Packages"]
    known = subprocess.run(wanted, capture_output=True, text=True, check=True).stdout.splitlines()
    if not known:
        pytest.skip("apt knows no mirror that a base image could be made from; run apt-get update")
    suite, mirror = known[0].split()
    done = subprocess.run(
        ["timeout", "240", "debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(root), mirror],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"no base image can be made: debootstrap says {done.stdout[-500:]}")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (root / f"usr/bin/python{version}").exists():
        pytest.skip(f"{suite}'s Python is not {version}, which the wheels are for")
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as archive:
        words = [CLIENT, "--host", engine.address, "import", "-", PYTHON_BASE]
        subprocess.run(words, stdin=archive.stdout, stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(root)


def wheels_for_builds(folder: Path) -> Path:
    """The pinned wheels in ``folder``, with this environment's build of torch: another one could be the GPUs'."""
    words = ["--constraint", "constraints/cpu.txt", "--no-build-isolation", "--prefer-binary", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), *words]
    done = subprocess.run(
        [*command, "setuptools", f"torch=={torch.__version__}", ".[formats]"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode != 0:
        pytest.skip(f"pip can't get the pinned wheels: {done.stderr[-500:]}")
    return folder
