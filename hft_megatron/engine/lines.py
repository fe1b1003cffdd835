"""The two lines of megatron-core that this package runs on, and what differs between them. Imports neither of them.

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
"""Holds what of a checkpoint is no tensor, under 0.16; 0.19 has it among the tensors."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of releases with the same inside."""

    name: str
    versions: SpecifierSet
    save_options: Mapping[str, str] = field(default_factory=dict)
    """What ``dist_checkpointing.save`` is given beyond the options that both lines have."""
    writes_files: str
    """The method of ``FileSystemWriterAsync`` that writes a rank's files."""
    has_common_file: bool
    """Whether rank 0 writes ``COMMON_STATE_FILE``, and a checkpoint without it can't be read."""
    needs_triton: bool = False
    """Whether it imports triton also where there is no GPU."""


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
    """The line of the megatron-core that is installed; UserError where it is of none, or can't be imported."""
    wanted = LINES[sys.version_info >= (3, 12)]
    remedy = f"run `pip install '{DISTRIBUTION}{wanted.versions}'`"
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise UserError(f"{DISTRIBUTION} is not installed; {remedy}.") from None
    line = line_of(version)
    if line is None:
        known = " and ".join(f"{one.name} ({one.versions})" for one in LINES)
        raise UserError(f"{DISTRIBUTION} {version} is installed, and {known} are supported; {remedy}.")
    if line.needs_triton and find_spec("triton") is None:
        raise UserError(
            f"{DISTRIBUTION} {version} imports triton, also without a GPU, and it is not installed; run `pip install "
            f"triton` (there is none but for Linux; elsewhere Python 3.11 with {DISTRIBUTION} 0.16 needs none)."
        )
    return line


def line_of(version: str) -> Line | None:
    """The line that a version of megatron-core belongs to, if any."""
    return next((line for line in LINES if line.versions.contains(version, prereleases=True)), None)


def refuse_if_unreadable(checkpoint: Path, files: Collection[str]) -> None:
    """UserError where the engine that is installed can't read a complete checkpoint, which was saved as ``files``.

    0.19 reads what 0.16 has written, not the other way round.
    """
    line, newer = engine_line(), LINES[-1]
    if line.has_common_file and COMMON_STATE_FILE not in files:
        raise UserError(
            f"--load {checkpoint.parent}: {checkpoint.name} was saved under {DISTRIBUTION} {newer.name} and can't be "
            f"read under {line.name}; resume with Python 3.12 or newer, where pip installs {newer.name}."
        )
