"""Writes the files of one save to the disk: in this process, or in a fork of it while training continues.

The only module that knows the inside of megatron-core's asynchronous save.
"""

import contextlib
import ctypes
import io
import os
import pickle
import queue
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import save, serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from hft_megatron.checkpoint.folders import Digest, digest_of
from hft_megatron.engine.lines import COMMON_STATE_FILE, engine_line

_PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl that sets the signal a process gets when its parent ends."""


class WriterReport:
    """Results of this rank's writer, passed through memory that a fork shares with its parent.

    Replaces megatron-core's queue between the two, which runs in a process of its own: a signal to a rank's process
    group would kill it, and with it the checkpoint that the signal requests.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint"), "w+b")
        self.digests: dict[str, Digest] = {}
        """Digests of the files that this rank wrote; known once the results were read."""
        self.failure: OSError | None = None
        """Error of rank 0 in writing a file for all ranks, which the others don't know of yet."""

    def put(self, results: dict[int, Any] | Exception, digests: dict[str, Digest]) -> None:
        """Passes on where the items are, or the error."""
        pickle.dump((results, digests), self._file)
        self._file.flush()

    def get_nowait(self) -> dict[int, Any] | Exception:
        """The results, or the error."""
        self._file.seek(0)
        try:
            results, self.digests = pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError("the background writer process was killed")
        return results  # type: ignore[no-any-return]

    def raise_failure(self) -> None:
        """Raises ``failure`` if there is one."""
        if self.failure is not None:
            raise self.failure


def request_save(state: dict[str, Any], folder: Path, metadata: dict[str, Any]) -> tuple[AsyncRequest, WriterReport]:
    """Plans the save of a sharded state dict into a folder; collective.

    The request writes when it is executed or scheduled. Where rank 0 cannot write a file for all ranks, now or when the
    request is finalized, the report has a failure and all ranks continue in step.
    """
    report = WriterReport()
    filesystem_async._results_queue = report
    with _noting_failures(report):
        options = engine_line().save_options
        request = save(state, str(folder), async_sharded_save=True, content_metadata=metadata, **options)
    assert request is not None
    request = request._replace(finalize_fns=[partial(_finalize, step, report) for step in request.finalize_fns])
    if request.async_fn is None:
        return request, report
    assert request.async_fn.func is getattr(FileSystemWriterAsync, engine_line().writes_files)
    transforms, _ = request.async_fn.args
    return request._replace(async_fn=partial(_write, transforms)), report


def _finalize(step: Callable[[], None], report: WriterReport) -> None:
    with _noting_failures(report):
        step()


@contextlib.contextmanager
def _noting_failures(report: WriterReport) -> Iterator[None]:
    """Within it, rank 0 records that it cannot write a file for all ranks, and continues.

    megatron-core would raise there, on rank 0 alone, while the others wait for it in their next collective.
    """

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any) -> None:
            try:
                write(*arguments)
            except OSError as error:
                report.failure = report.failure or error

        return attempt

    alone: list[tuple[Any, str, Callable[..., None]]] = [
        (FileSystemWriterAsync, "finish", FileSystemWriterAsync.finish),
        (serialization, "save_config", serialization.save_config),
    ]
    if engine_line().has_common_file:
        alone.append((common.TorchCommonSaveStrategy, "save_common", _save_common))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in alone]
    try:
        for owner, name, write in alone:
            setattr(owner, name, noting(write))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _save_common(strategy: Any, state: dict[str, Any], folder: str) -> None:
    """megatron-core's own function, but through memory: torch.save to a file does not report why a write failed."""
    del strategy
    if dist.get_rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        (Path(folder) / COMMON_STATE_FILE).write_bytes(buffer.getvalue())


def reason_of(failures: Mapping[int, Any]) -> str:
    """One reason for a save that failed on some ranks, from the failures of a CheckpointException on rank 0."""
    if not failures:
        return ""
    rank = min(failures)
    reason = str(failures[rank][0]).removeprefix("Worker failure: ")
    others = len(failures) - 1
    return f"rank {rank}: {reason}{f' (and {others} more)' if others else ''}"


def _write(transforms: list[Any], rank: int, buckets: list[Any], report: WriterReport) -> None:
    """Writes and reads back this rank's files, one after the other, in the calling process.

    megatron-core's own function forks a process per file and waits forever when one of them is killed.
    """
    del rank  # megatron-core passes it for its log lines
    written: dict[int, Any] = {}
    digests: dict[str, Digest] = {}
    for index, bucket in enumerate(buckets):
        outcomes: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcomes, pending, True)
        _, written[index] = outcomes.get_nowait()
        failure = written[index] if isinstance(written[index], Exception) else None
        path = Path(bucket[0])
        if failure is None:
            try:
                digests[path.name] = digest_of(path)
            except OSError as error:
                failure = error
        if failure is not None:
            # Its own type may not survive pickling; its message does.
            report.put(RuntimeError(str(_told_by_system(failure))), {})
            return
    report.put(written, digests)


def _told_by_system(error: BaseException) -> BaseException:
    """The operating system's own error, where torch has replaced it by a less specific one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def in_background(request: AsyncRequest) -> AsyncRequest:
    """The request for a fork of this process, which ignores the signals that stop a run, and ends with its parent."""
    if request.async_fn is None:
        return request
    write = partial(_write_as_fork, os.getpid(), request.async_fn)
    return request._replace(async_fn=write, preload_fn=_kept(request.preload_fn))


def _kept(stage: Callable[[], Any]) -> Callable[[], Any]:
    """The function that copies tensors from the device, with copies that live as long as the request.

    They are in pinned memory, which a fork shares with its parent: 0.16 frees them after the fork, and the parent's
    next pinned memory would overwrite them before they are written.
    """
    kept = []

    def stage_and_keep() -> Any:
        kept.append(stage())
        return kept[0]

    return stage_and_keep


def _write_as_fork(parent: int, write: Any, *arguments: Any) -> None:
    # A run that a signal stops waits for this save.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A fork has its rank's sockets: while it outlives a rank that was killed, other ranks wait for that rank.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        write(*arguments)
