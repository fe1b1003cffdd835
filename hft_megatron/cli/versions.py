"""``hft-megatron --version``: this package and what it runs on. Asks what is installed and imports none of it."""

import platform
import runpy
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import hft_megatron

ABSENT = "not installed"
APEX_KERNELS = "amp_C"
"""The module of NVIDIA's Apex by which it is told from the `apex` on PyPI, another project."""


def version_text() -> str:
    """One line per thing."""
    return "\n".join(f"{name} {version}" for name, version in _versions())


def _versions() -> Iterator[tuple[str, str]]:
    yield "hft-megatron", f"{hft_megatron.__version__}, Python {platform.python_version()}"
    yield "torch", _torch()
    yield "megatron-core", _installed("megatron-core")
    yield "transformer-engine", _installed("transformer-engine")
    kernels = "with" if find_spec(APEX_KERNELS) else "without"
    apex = _installed("apex")
    yield "Apex", apex if apex == ABSENT else f"{apex}, {kernels} its CUDA kernels"


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ABSENT


def _torch() -> str:
    """The version, and what the build is for: by the file that torch itself takes them from, in no time."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ABSENT
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    cuda = facts["cuda"]
    return f"{facts['__version__']}, {'for CPU' if cuda is None else f'for CUDA {cuda}'}"
