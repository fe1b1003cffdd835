"""The checkpoints in a run's folder: which are complete, which is the newest, which may go. Imports no torch.

A checkpoint is complete when it has its list of digests, the last file that is written into it before it gets its name.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.checkpoint.digests import DIGESTS_FILE
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE
from hft_megatron.errors import UserError

ITERATION_FOLDER = "iter_{:07d}"
UNFINISHED = ".unfinished"
"""Ends the name of a folder that is being written, or deleted, or that was when its run died."""
DAMAGED = ".damaged"
"""Ends the name of a checkpoint that --load-fallback has put aside."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What a folder holds."""

    folder: Path
    complete: tuple[Path, ...] = ()
    """Newest first."""
    unfinished: tuple[Path, ...] = ()
    tracked: int | None = None
    """The iteration that the tracker file names; None where there is no tracker."""

    @property
    def newest(self) -> Path | None:
        return self.complete[0] if self.complete else None

    @property
    def missing(self) -> Path | None:
        """The checkpoint that the tracker names, where it was complete once and is not any more."""
        if self.tracked is None or any(iteration_of(path) == self.tracked for path in self.complete):
            return None
        return self.folder / ITERATION_FOLDER.format(self.tracked)

    def notes(self) -> list[str]:
        """Lines for the log: what is not chosen although it looks like a checkpoint, and why."""
        lines = [f"{path} is skipped: it is not complete" for path in self.unfinished if path != self.missing]
        if self.newest is not None and self.tracked is not None and self.tracked < iteration_of(self.newest):
            lines.append(
                f"{self.newest} is newer than iteration {self.tracked}, which {CHECKPOINT_TRACKER_FILE} names, and "
                f"complete: the run stopped between the two"
            )
        return lines


def find_checkpoints(folder: str) -> Checkpoints:
    """What ``folder`` holds, nothing where it does not exist; UserError for a tracker that names no iteration."""
    root = Path(folder)
    complete = complete_checkpoints(folder)
    others = [path for path in sorted(root.glob("iter_*")) if path not in complete]
    return Checkpoints(
        folder=root,
        complete=tuple(complete),
        unfinished=tuple(path for path in others if not path.name.endswith(DAMAGED)),
        tracked=_tracked_iteration(root),
    )


def checkpoint_at(folder: str, iteration: int | None) -> Path:
    """The complete checkpoint of an iteration, the newest for None; UserError for one that is not there."""
    found = find_checkpoints(folder)
    there = ", ".join(str(iteration_of(path)) for path in reversed(found.complete))
    if not there:
        raise UserError(
            f"--load {folder} holds no complete checkpoint; name the --save folder of a run that saved one."
        )
    if iteration is not None:
        path = Path(folder) / ITERATION_FOLDER.format(iteration)
        if path not in found.complete:
            raise UserError(
                f"--iteration {iteration}: --load {folder} has no complete checkpoint of it; there are: {there}."
            )
        return path
    if found.missing is not None:
        raise UserError(
            f"--load {folder}: {found.missing} is not there, but {CHECKPOINT_TRACKER_FILE} names it; choose one that "
            f"is there with --iteration: {there}."
        )
    return found.complete[0]


def complete_checkpoints(folder: str) -> list[Path]:
    """The complete checkpoints in ``folder``, newest first."""
    named = [path for path in Path(folder).glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    return sorted((path for path in named if (path / DIGESTS_FILE).exists()), key=iteration_of, reverse=True)


def newest_in_words(folder: str) -> str:
    """The end of a sentence about a run that failed: where it can go on from."""
    complete = complete_checkpoints(folder)
    return f"{complete[0]} is the newest complete one" if complete else "none is complete yet"


def _tracked_iteration(folder: Path) -> int | None:
    tracker = folder / CHECKPOINT_TRACKER_FILE
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"--load {folder}: {CHECKPOINT_TRACKER_FILE} holds {text!r}, which is not an iteration number.")
    return int(text)


def iteration_of(path: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(path.name.removeprefix("iter_"))


def delete_superseded(folder: str, *, keep_last: int | None, retain_interval: int | None) -> list[Path]:
    """Deletes the checkpoints that --keep-last and --save-retain-interval let go; returns them.

    Kept are the newest ``keep_last`` (1 where only the interval is given), every one whose iteration is a multiple of
    ``retain_interval``, and what a kept checkpoint needs as its base. Raises OSError where one can't be deleted, and
    UserError, before any is, where a kept one can't be read.
    """
    if keep_last is None and retain_interval is None:
        return []
    complete = complete_checkpoints(folder)
    kept = set(complete[: keep_last or 1])
    if retain_interval is not None:
        kept |= {path for path in complete if iteration_of(path) % retain_interval == 0}
    bases = {TrainState.read(path).base_iteration for path in kept}
    kept |= {path for path in complete if iteration_of(path) in bases}
    gone = [path for path in complete if path not in kept]
    for path in gone:
        delete_checkpoint(path)
    return gone


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint so that whoever looks meanwhile, or after a crash, sees a whole one or an unfinished one."""
    dying = path.with_name(path.name + UNFINISHED)
    shutil.rmtree(dying, ignore_errors=True)
    path.rename(dying)
    shutil.rmtree(dying)
