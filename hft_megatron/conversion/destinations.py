"""Where an export goes: each is written elsewhere first, and is there when it is complete. Imports no torch."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.export_folder import FINAL, UNFINISHED, ExportFolder


@dataclass(frozen=True, kw_only=True)
class IterationExport:
    """Where the export of an iteration goes."""

    folder: ExportFolder
    iteration: int
    measured: Mapping[str, float]
    """What validation measured there, by name."""

    @property
    def target(self) -> Path:
        return self.folder.place(self.iteration)

    def open(self) -> Path:
        return self.folder.open(self.target.name)

    def publish(self, unfinished: Path) -> list[str]:
        return self.folder.publish(unfinished, self.iteration, self.measured)


@dataclass(frozen=True, kw_only=True)
class FinalExport:
    """Where the export at the end of such a run goes: beside those of its iterations."""

    folder: ExportFolder
    iteration: int

    @property
    def target(self) -> Path:
        return self.folder.path

    def open(self) -> Path:
        return self.folder.open(FINAL)

    def publish(self, unfinished: Path) -> list[str]:
        self.folder.publish_final(unfinished, self.iteration)
        return []


@dataclass(frozen=True, kw_only=True)
class NewFolder:
    """An export alone, in a folder that appears with it."""

    target: Path

    def open(self) -> Path:
        unfinished = self.target.with_name(UNFINISHED.format(self.target.name))
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def publish(self, unfinished: Path) -> list[str]:
        os.replace(unfinished, self.target)
        return []


Destination = NewFolder | IterationExport | FinalExport
"""``target`` is what the log calls it; ``open`` gives an empty folder to write into, and ``publish`` puts it there when
it is complete and returns lines for the log."""
