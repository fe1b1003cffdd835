"""Check 0: installs missing packages from the wheels beside this file, and runs doctor on machine and ranks."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from acceptance import INSTALLED
from product import started
from working_site import CheckFailed, Site, expect

WHEELS = Path(__file__).resolve().parent / "wheels"
NEEDED = ("megatron-core", "tyro", "docstring-parser", "typeguard")


def install_and_examine(site: Site) -> dict[str, Any]:
    """Installs the packages that are missing into a folder of their own, and runs ``hft-megatron doctor``."""
    missing = [name for name in NEEDED if not _is_here(name)]
    if missing:
        _install(missing)
    log = site.folder / "doctor.log"
    with started(["doctor"], log, ranks=site.ranks) as process:
        code = process.wait()
    said = log.read_text(encoding="utf-8", errors="replace")
    print(said)
    expect(code == 0, f"hft-megatron doctor ended with exit code {code}: {said[-1500:]}")
    return {"installed": " ".join(missing) or "nothing"}


def _is_here(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _install(names: list[str]) -> None:
    if not WHEELS.is_dir():
        raise CheckFailed(
            f"{', '.join(names)} are not installed and there is no {WHEELS}; run tools/gpu/fetch_wheels.sh where there "
            "is a network and copy that folder with the checkout."
        )
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links", str(WHEELS)]
    done = subprocess.run([*command, "--target", str(INSTALLED), *names], capture_output=True, text=True)
    expect(done.returncode == 0, f"pip ended with exit code {done.returncode}: {done.stderr[-1500:]}")
