"""How the files of one save reach the disk: by this process, or by a fork of it while training goes on.

The only module that knows the inside of megatron-core's asynchronous save.
"""

import os
import pickle
import queue
import signal
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import save
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from hft_megatron.checkpoint.digests import Digest, digest_of


class WriterReport:
    """What the writer of this rank has to say, handed over in memory that a fork shares with its parent.

    Stands for megatron-core's queue between the two. That one lives in a process of its own, which a signal to a
    rank's process group kills, and with it the checkpoint that the signal asks for.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint"), "w+b")
        self.digests: dict[str, Digest] = {}
        """Of the files this rank wrote; known once the results were taken."""

    def put(self, results: dict[int, Any] | Exception, digests: dict[str, Digest]) -> None:
        """Says which items are where, or what went wrong."""
        pickle.dump((results, digests), self._file)
        self._file.flush()

    def get_nowait(self) -> dict[int, Any] | Exception:
        """The results; raises queue.Empty where the writer was killed before it could report."""
        self._file.seek(0)
        try:
            results, self.digests = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        return results  # type: ignore[no-any-return]


def request_save(state: dict[str, Any], folder: Path, metadata: dict[str, Any]) -> tuple[AsyncRequest, WriterReport]:
    """Plans the save of a sharded state dict into an empty folder; collective.

    The request writes when it is executed or scheduled. Raises OSError where rank 0 can't write the common part.
    """
    report = WriterReport()
    filesystem_async._results_queue = report
    request = save(state, str(folder), async_sharded_save=True, content_metadata=metadata)
    assert request is not None
    if request.async_fn is None:
        return request, report
    assert request.async_fn.func is FileSystemWriterAsync.write_preloaded_data_multiproc
    transforms, _ = request.async_fn.args
    return request._replace(async_fn=partial(_write, transforms)), report


def _write(transforms: list[Any], rank: int, buckets: list[Any], report: WriterReport) -> None:
    """Writes and reads back this rank's files, one after the other, in the process that calls it.

    megatron-core's own function forks a process per file and waits for ever when one of them is killed.
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
            # Its own type may not survive the way to the parent; what it says does.
            report.put(RuntimeError(str(failure)), {})
            return
    report.put(written, digests)


def in_background(request: AsyncRequest) -> AsyncRequest:
    """The request for a fork of this process: the signals that stop a run must not stop the save it waits for."""
    if request.async_fn is None:
        return request
    return request._replace(async_fn=partial(_deaf_to_signals, request.async_fn))


def _deaf_to_signals(write: Any, *arguments: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    write(*arguments)
