"""The two lines of megatron-core that this package runs on, and their differences. Imports neither of them.

0.16 is the last line for Python 3.10 and 3.11. From 3.12 on pip takes 0.19, which writes a checkpoint's common state
in another way and threads its files instead of forking. Calls that differ only in what they pass (the ``name`` of a
layer, for one) are not listed: the modules that are called take either.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.specifiers import SpecifierSet

from hft_megatron.errors import UserError

DISTRIBUTION = "megatron-core"
COMMON_STATE_FILE = "common.pt"
"""Holds the parts of a checkpoint that are no tensors, under 0.16; 0.19 stores them among the tensors."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of releases with the same inside."""

    name: str
    versions: SpecifierSet
    save_options: Mapping[str, str] = field(default_factory=dict)
    """Arguments of ``dist_checkpointing.save`` beyond those that both lines have."""
    writes_files: str
    """The method of ``FileSystemWriterAsync`` that writes a rank's files."""
    has_common_file: bool
    """True if rank 0 writes ``COMMON_STATE_FILE``, and a checkpoint without it cannot be read."""
    needs_triton: bool = False
    """True if it imports triton even without a GPU."""


LINES = (
    Line(
        name="0.16",
        versions=SpecifierSet(">=0.16.1,<0.17"),
        writes_files="write_preloaded_data_multiproc",
        has_common_file=True,
    ),
    Line(
        name="0.19",
        versions=SpecifierSet(">=0.19,<0.20"),
        # Its default, nvrx, needs a package of its own.
        save_options={"async_strategy": "mcore"},
        writes_files="write_preloaded_data_multithread",
        has_common_file=False,
        needs_triton=True,
    ),
)


@cache
def engine_line() -> Line:
    """The line of the installed megatron-core; UserError where it belongs to none, or cannot be imported."""
    wanted = LINES[sys.version_info >= (3, 12)]
    remedy = f"run `pip install '{DISTRIBUTION}{wanted.versions}'`"
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise UserError(f"{DISTRIBUTION} is not installed; {remedy}.") from None
    line = line_of(version)
    if line is None:
        known = " and ".join(f"{one.name} ({one.versions})" for one in LINES)
        raise UserError(f"{DISTRIBUTION} {version} is installed, but only {known} are supported; {remedy}.")
    if line.needs_triton and find_spec("triton") is None:
        raise UserError(
            f"{DISTRIBUTION} {version} imports triton even without a GPU, but it is not installed; run `pip install "
            f"triton` (it exists for Linux only; elsewhere use Python 3.11 with {DISTRIBUTION} 0.16, which needs none)."
        )
    return line


def line_of(version: str) -> Line | None:
    """The line that a version of megatron-core belongs to, if any."""
    return next((line for line in LINES if line.versions.contains(version, prereleases=True)), None)


def refuse_if_unreadable(checkpoint: Path, files: Collection[str]) -> None:
    """Raise UserError where the installed engine cannot read a complete checkpoint, which was saved as ``files``.

    0.19 reads what 0.16 has written, not the other way round.
    """
    line, newer = engine_line(), LINES[-1]
    if line.has_common_file and COMMON_STATE_FILE not in files:
        raise UserError(
            f"--load {checkpoint.parent}: {checkpoint.name} was saved with {DISTRIBUTION} {newer.name} and cannot be "
            f"read with {line.name}; resume with Python 3.12 or newer, where pip installs {newer.name}."
        )
