"""The checkpoints in a run's folder: complete and incomplete ones, and the digests of their files.

A checkpoint is complete when it has its list of digests, the last file that is written into it before it gets its name.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.file_digest import file_digest
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, FINISHED_FILE, found_again, sync, write_atomically
from hft_megatron.errors import UserError

DIGESTS_FILE = "digests.json"


class Digest(TypedDict):
    """Digest and size that a file must have."""

    sha256: str
    """Digest in hexadecimal."""
    bytes: int


def digest_of(path: Path) -> Digest:
    """Digest of a file, which it reads whole; raises OSError."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def write_digests(folder: Path, digests: Mapping[str, Digest]) -> None:
    """Completes the folder: computes the missing digests and syncs everything to the disk.

    ``digests`` are those of files that their writers have read back already. Raises OSError.
    """
    known = dict(digests)
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            known[path.name] = digest_of(path)
            sync(path)
    write_atomically(folder / DIGESTS_FILE, json.dumps(known, indent=1, sort_keys=True) + "\n")
    sync(folder)


def read_digests(folder: Path) -> dict[str, Digest]:
    """The digests of a complete checkpoint by file name; raises ValueError for a list that cannot be read."""
    listed = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    try:
        return {name: Digest(sha256=str(one["sha256"]), bytes=int(one["bytes"])) for name, one in listed.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a list of digests: {error}") from error


def damage_in(folder: Path, digests: Mapping[str, Digest], files: Sequence[str]) -> str | None:
    """The damage of the first of ``files`` that is not as it was saved, as a clause, or None."""
    for name in files:
        path, saved = folder / name, digests.get(name)
        if saved is None:
            return f"{path} is not in {DIGESTS_FILE}"
        try:
            size = path.stat().st_size
            found = digest_of(path)["sha256"] if size == saved["bytes"] else None
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found is None:
            return f"{path} has {size} bytes, but {saved['bytes']} were saved"
        if found != saved["sha256"]:
            return f"{path} is not as it was saved (sha256 {found[:12]} instead of {saved['sha256'][:12]})"
    return None


def identity_of(folder: Path) -> str:
    """sha256 (hex) that identifies every byte of a complete checkpoint: that of its list of digests."""
    return digest_of(folder / DIGESTS_FILE)["sha256"]


def combined_digest(files: Mapping[str, Digest]) -> str:
    """sha256 (hex) that identifies several files and their names."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


ITERATION_FOLDER = "iter_{:07d}"
UNFINISHED = ".unfinished"
"""Suffix of a folder that is being written or deleted, or was when its run died."""
DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint that --load-fallback has renamed."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints in a folder."""

    folder: Path
    complete: tuple[Path, ...] = ()
    """Complete ones, newest first."""
    unfinished: tuple[Path, ...] = ()
    tracked: int | None = None
    """The iteration that the tracker file names; None where there is no tracker."""

    @property
    def newest(self) -> Path | None:
        return self.complete[0] if self.complete else None

    @property
    def missing(self) -> Path | None:
        """The checkpoint that the tracker names, where it was complete once and no longer is."""
        if self.tracked is None or any(iteration_of(path) == self.tracked for path in self.complete):
            return None
        return self.folder / ITERATION_FOLDER.format(self.tracked)

    @property
    def is_empty(self) -> bool:
        """Return whether it holds no checkpoint, and none is missing."""
        return self.newest is None and self.missing is None

    def notes(self) -> list[str]:
        """Lines for the log about incomplete checkpoints, and about one that is newer than the tracker."""
        lines = [f"skipping {path}: it is incomplete" for path in self.unfinished if path != self.missing]
        if self.newest is not None and self.tracked is not None and self.tracked < iteration_of(self.newest):
            lines.append(
                f"{self.newest} is complete and newer than iteration {self.tracked} in {CHECKPOINT_TRACKER_FILE}: the "
                f"run stopped before it could update that file"
            )
        return lines


def find_checkpoints(folder: str) -> Checkpoints:
    """The checkpoints in ``folder``, none where it does not exist; UserError for a tracker that names no iteration."""
    root = Path(folder)
    complete = complete_checkpoints(folder)
    others = [path for path in sorted(root.glob("iter_*")) if path not in complete]
    return Checkpoints(
        folder=root,
        complete=tuple(complete),
        unfinished=tuple(path for path in others if not path.name.endswith(DAMAGED)),
        tracked=_tracked_iteration(root),
    )


def checkpoint_at(folder: str, iteration: int | None, *, option: str = "--load") -> Path:
    """The complete checkpoint of an iteration, the newest for None; UserError where it does not exist."""
    found = find_checkpoints(folder)
    there = ", ".join(str(iteration_of(path)) for path in reversed(found.complete))
    if not there and (Path(folder) / FINISHED_FILE).exists():
        raise UserError(
            f"{option} {folder} holds a finished task whose checkpoints --continual-discard has deleted; give the "
            f"folder of a later task."
        )
    if not there:
        raise UserError(
            f"{option} {folder} holds no complete checkpoint; give the --save folder of a run that saved one."
        )
    if iteration is not None:
        path = Path(folder) / ITERATION_FOLDER.format(iteration)
        if path not in found.complete:
            raise UserError(
                f"--iteration {iteration}: {option} {folder} has no complete checkpoint of it; choose one of {there}."
            )
        return path
    if found.missing is not None:
        raise UserError(
            f"{option} {folder}: {found.missing}, which {CHECKPOINT_TRACKER_FILE} names, does not exist; choose "
            f"another iteration: {there}."
        )
    return found.complete[0]


def complete_checkpoints(folder: str) -> list[Path]:
    """The complete checkpoints in ``folder``, newest first."""
    named = [path for path in Path(folder).glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    return sorted((path for path in named if (path / DIGESTS_FILE).exists()), key=iteration_of, reverse=True)


def newest_in_words(folder: str) -> str:
    """The end of a sentence about a failed run: the checkpoint that it can resume from."""
    complete = complete_checkpoints(folder)
    return f"the newest complete checkpoint is {complete[0]}" if complete else "no checkpoint is complete yet"


def _tracked_iteration(folder: Path) -> int | None:
    tracker = folder / CHECKPOINT_TRACKER_FILE
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"--load {folder}: {CHECKPOINT_TRACKER_FILE} holds {text!r}, which is not an iteration.")
    return int(text)


def iteration_of(path: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(path.name.removeprefix("iter_"))


def base_of(path: Path, state: TrainState) -> Path | None:
    """Path of the checkpoint with the weights that the one at ``path`` leaves out, whether it exists or not; None where
    they are in the --load-hf folder, and for a whole one. ``state`` is its position."""
    if state.base_iteration is None:
        return None
    name = ITERATION_FOLDER.format(state.base_iteration)
    if state.base_folder is None:
        return path.with_name(name)
    run = Path(os.path.normpath(path.parent.resolve() / state.base_folder))
    return found_again(run, beside=path.parent) / name


def damage_of_base(path: Path, state: TrainState, base: Path) -> str | None:
    """The reason why ``base`` is not the base of the checkpoint at ``path``, as a clause, or None."""
    saved = str(state.base_digest)
    try:
        found = identity_of(base)
    except OSError as error:
        return (
            f"{path} holds only the weights trained in its round (--save-trained-only), and its base {base} cannot be "
            f"read ({error.strerror})"
        )
    if found != saved:
        return f"{base} is not the base of {path.name} (sha256 {found[:12]} instead of {saved[:12]})"
    return None


def chain_of(path: Path, *, option: str = "--load") -> Iterator[tuple[Path, TrainState]]:
    """A checkpoint, its base, and so on to the last, with their positions; each is read on demand. UserError for a base
    that is gone or has changed; ``option`` names the run there.
    """
    base: Path | None = path
    while base is not None:
        at, state = base, TrainState.read(base, option=option)
        yield at, state
        base = base_of(at, state)
        damage = None if base is None else damage_of_base(at, state, base)
        if damage is not None:
            raise UserError(f"{option} {path.parent}: {damage}; put that checkpoint back, or choose another iteration.")


def end_of_chain(path: Path, *, option: str = "--load") -> TrainState:
    """The position of the last checkpoint in the chain, which shows whether the rest is in the --load-hf folder."""
    *_, (_, state) = chain_of(path, option=option)
    return state


def delete_superseded(folder: str, *, keep_last: int | None, retain_interval: int | None) -> list[Path]:
    """Deletes the checkpoints that --keep-last and --save-retain-interval don't keep; returns their paths.

    Kept are the newest ``keep_last`` (1 where only the interval is given), every one whose iteration is a multiple of
    ``retain_interval``, and the bases of kept ones; bases in other runs' folders are not touched. Raises OSError where
    one cannot be deleted, and UserError, before any deletion, where a kept one cannot be read.
    """
    if keep_last is None and retain_interval is None:
        return []
    complete = complete_checkpoints(folder)
    kept = set(complete[: keep_last or 1])
    if retain_interval is not None:
        kept |= {path for path in complete if iteration_of(path) % retain_interval == 0}
    # A base in the folder is whole, or has its own base elsewhere: one level is enough.
    kept |= {base for base in [base_of(path, TrainState.read(path)) for path in kept] if base in complete}
    gone = [path for path in complete if path not in kept]
    for path in gone:
        delete_checkpoint(path)
    return gone


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint so that at every moment, or after a crash, it is either whole or marked as unfinished."""
    dying = path.with_name(path.name + UNFINISHED)
    shutil.rmtree(dying, ignore_errors=True)
    path.rename(dying)
    shutil.rmtree(dying)
