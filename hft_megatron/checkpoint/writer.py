"""Saves the checkpoints of a run: under a temporary name, synced, renamed when complete, the tracker last."""

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from hft_megatron.checkpoint.folders import (
    ITERATION_FOLDER,
    UNFINISHED,
    delete_checkpoint,
    delete_superseded,
    identity_of,
    newest_in_words,
    write_digests,
)
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.store import METADATA, PLAN_FILE, sharded_state
from hft_megatron.checkpoint.writing import WriterReport, in_background, reason_of, request_save
from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, sync, write_atomically
from hft_megatron.errors import RunFailed, UserError
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import Placement
from hft_megatron.parallel.meeting import wait_for_all_ranks

_PAUSE_S = 0.05
"""Seconds between checks whether the writers in the background are done."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A complete checkpoint and the time it took."""

    path: Path
    state: TrainState
    tensor_bytes: int
    """Size of the files that hold its tensors."""
    stall_s: float
    """Seconds for which training paused."""
    total_s: float
    """Seconds from the beginning of the save until the checkpoint was complete."""
    deleted: tuple[Path, ...]
    """Checkpoints that it superseded."""
    not_deleted: str | None
    """Reason why others that it superseded could not be deleted."""
    digest: str
    """``folders.identity_of`` it, the same on every rank."""


@dataclass(kw_only=True)
class _Save:
    """A save that has begun."""

    state: TrainState
    unfinished: Path
    begun: float
    tensor_bytes: int = 0
    stall_s: float = 0.0
    deleted: tuple[Path, ...] = ()
    not_deleted: str | None = None
    digest: str = ""


class CheckpointWriter:
    """Writes one checkpoint at a time into ``options.save``. Every rank calls every method.

    A run killed at any moment leaves the previous checkpoint whole. A failed write is RunFailed on all ranks, with the
    reason; the previous checkpoint is then still the newest.
    """

    def __init__(self, options: CheckpointConfig, placement: Placement) -> None:
        assert options.save is not None
        self._folder = Path(options.save)
        self._options = options
        self._placement = placement
        self._calls = AsyncCallsQueue()
        self._pending: _Save | None = None

    def save(
        self, wrapped: WrappedModel, state: TrainState, *, left_out: frozenset[str] = frozenset()
    ) -> SavedCheckpoint | None:
        """Saves all but the weights of the units in ``left_out``, which ``state`` must name a base for.

        Returns None with --async-save: a fork of this process then writes, and ``finish`` returns the result.
        """
        assert self._pending is None, "the save before is not finished"
        save = self._begin(replace(state, unit_steps=wrapped.unit_steps), wrapped)
        with wrapped.gathered_parameters():
            described = sharded_state(wrapped, self._placement, left_out=left_out)
            with self._failing(save):
                request, report = request_save(described, save.unfinished, dict(METADATA))
                self._on_first_rank(save, report.raise_failure)
                request.add_finalize_fn(lambda: self._complete(save, report))
                if self._options.async_save:
                    self._calls.schedule_async_request(in_background(request))
                else:
                    request._replace(async_fn=partial(write_and_wait, request.async_fn)).execute_sync()
        save.stall_s = time.perf_counter() - save.begun
        if self._options.async_save:
            self._pending = save
            return None
        return self._saved(save)

    def finish(self, *, wait: bool) -> SavedCheckpoint | None:
        """The checkpoint that was being written in the background, if it is complete now; ``wait`` waits for that."""
        save = self._pending
        if save is None:
            return None
        begun = time.perf_counter()
        with self._failing(save):
            # Without blocking, which would be inside a collective until the slowest rank has written.
            while not (done := self._calls.maybe_finalize_async_calls()) and wait:
                time.sleep(_PAUSE_S)
        save.stall_s += time.perf_counter() - begun
        if not done:
            return None
        self._pending = None
        return self._saved(save)

    def _begin(self, state: TrainState, wrapped: WrappedModel) -> _Save:
        """A folder to write into, with a new name every time: a writer that outlived its run cannot reach it."""
        begun = time.perf_counter()
        name = [f"{ITERATION_FOLDER.format(state.iteration)}{UNFINISHED}-{secrets.token_hex(4)}"]
        dist.broadcast_object_list(name, src=0)
        save = _Save(state=state, unfinished=self._folder / name[0], begun=begun)

        def begin() -> None:
            for stale in self._folder.glob(f"iter_*{UNFINISHED}*"):
                shutil.rmtree(stale, ignore_errors=True)
            save.unfinished.mkdir(parents=True)
            state.write(save.unfinished)
            (save.unfinished / PLAN_FILE).write_text(wrapped.plan.to_json(), encoding="utf-8")

        self._on_first_rank(save, begin)
        return save

    def _complete(self, save: _Save, report: WriterReport) -> None:
        """Completes a save once all ranks have written: lists their digests, renames the folder, moves the tracker."""
        digests = gathered(report.digests)
        save.tensor_bytes = sum(digest["bytes"] for one in digests for digest in one.values())

        def complete() -> None:
            report.raise_failure()
            write_digests(save.unfinished, {name: digest for one in digests for name, digest in one.items()})
            path = self._folder / ITERATION_FOLDER.format(save.state.iteration)
            if path.exists():
                delete_checkpoint(path)
            save.unfinished.rename(path)
            sync(self._folder)
            write_atomically(self._folder / CHECKPOINT_TRACKER_FILE, f"{save.state.iteration}\n")
            save.digest = identity_of(path)
            self._delete_superseded(save)

        self._on_first_rank(save, complete)
        digest = [save.digest]
        dist.broadcast_object_list(digest, src=0)
        [save.digest] = digest

    def _delete_superseded(self, save: _Save) -> None:
        # The new checkpoint is complete: failing to delete an old one is no reason to end the run.
        keep_last, retain_interval = self._options.keep_last, self._options.save_retain_interval
        try:
            gone = delete_superseded(str(self._folder), keep_last=keep_last, retain_interval=retain_interval)
            save.deleted = tuple(gone)
        except (OSError, UserError) as error:
            save.not_deleted = str(error)

    def _saved(self, save: _Save) -> SavedCheckpoint:
        return SavedCheckpoint(
            path=self._folder / ITERATION_FOLDER.format(save.state.iteration),
            state=save.state,
            tensor_bytes=save.tensor_bytes,
            stall_s=save.stall_s,
            total_s=time.perf_counter() - save.begun,
            deleted=save.deleted,
            not_deleted=save.not_deleted,
            digest=save.digest,
        )

    def _on_first_rank(self, save: _Save, act: Callable[[], None]) -> None:
        reason = None
        if self._placement.rank == 0:
            try:
                act()
            except OSError as error:
                reason = str(error)
        wait_for_all_ranks()
        self._raise_if_any(save, reason)

    @contextlib.contextmanager
    def _failing(self, save: _Save) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            # On every rank, but only rank 0 has the reasons.
            self._raise_if_any(save, reason_of(error.failures))

    def _raise_if_any(self, save: _Save, reason: str | None) -> None:
        """RunFailed on all ranks with rank 0's reason, if there is one; no rank may be writing any more."""
        reasons = [reason]
        dist.broadcast_object_list(reasons, src=0)
        if reasons[0] is None:
            return
        if self._placement.rank == 0:
            # The files are of no use, and on a full disk they would leave no room for the status file.
            shutil.rmtree(save.unfinished, ignore_errors=True)
        raise RunFailed(
            f"the checkpoint of iteration {save.state.iteration} cannot be written to {self._folder}: {reasons[0]}; "
            f"{newest_in_words(str(self._folder))}."
        )


def write_and_wait(write: Callable[..., None] | None, *arguments: Any) -> None:
    """Writes this rank's files, if it has any, and waits for the others without megatron-core's collective."""
    if write is not None:
        write(*arguments)
    wait_for_all_ranks()
