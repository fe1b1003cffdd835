"""Makes preprocessed data: one process reads and writes in order, workers tokenize in between."""

import gc
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from hft_megatron.config.file_digest import file_digest
from hft_megatron.data.examples import ExampleRules
from hft_megatron.data.files.rows import holds_separator
from hft_megatron.data.files.sources import FACTS, UNFINISHED, kind_of_file
from hft_megatron.data.preprocessed.facts import Facts, Job, read_facts
from hft_megatron.data.preprocessed.index_file import Chunk, cut_chunks
from hft_megatron.data.preprocessed.output import Output
from hft_megatron.data.preprocessed.worker import DocumentMaker, Documents, make_documents, start_worker
from hft_megatron.data.record_errors import check_use
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import RunFailed, Stopped, UserError


class ProgressReport:
    """Documents per second and the time left, by the bytes of input that are done."""

    def __init__(
        self, *, total: int, position: int, documents: int, log_interval: int, announce: Callable[[str], None]
    ) -> None:
        """``position`` of ``total`` bytes of input and ``documents`` are already done.

        Without a terminal a line is logged every ``log_interval`` documents.
        """
        self._total = total
        self._first_position, self._first_documents = position, documents
        self._interval = log_interval
        self._next_line = documents + log_interval
        self._announce = announce
        self._bar: Any = None
        self._begin = time.monotonic()

    def update(self, position: int, documents: int) -> None:
        """Reports the position and the number of documents that are done now."""
        seconds = max(time.monotonic() - self._begin, 1e-9)
        rate = (documents - self._first_documents) / seconds
        said = f"{documents:,} documents, {rate:,.0f} documents/s"
        if sys.stderr.isatty():
            # Not before the first documents: the bar starts a thread, and workers are forked by then.
            if self._bar is None:
                form = "{percentage:3.0f}%|{bar}|{postfix}, {elapsed} elapsed, {remaining} left"
                self._bar = tqdm(total=self._total, initial=self._first_position, bar_format=form)
                self._bar.start_t -= seconds
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(position - self._bar.n)
        elif documents >= self._next_line:
            left = (self._total - position) * seconds / max(position - self._first_position, 1)
            self._announce(f"{said}, {position / self._total:.1%} of the input, {_clock(left)} left")
            self._next_line = documents + self._interval

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


Announce = Callable[[str], None]
RECORD_SECONDS = 2.0
"""Seconds between two entries of the journal: a kill loses at most this much work, and a disk syncs no more often."""
_CHUNKS_PER_WORKER = 3
"""Chunks that are read ahead: one in work, one waiting for its worker and one waiting to be written."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Inputs, output and rules of a preprocessing."""

    files: tuple[Path, ...]
    prefix: str
    rules: ExampleRules
    append_eod: bool
    document_separator: str | None
    skips_bad_lines: bool
    workers: int
    log_interval: int
    """Documents between two lines of the log."""


def preprocess(asked: Preprocessing, tokenizer: Tokenizer, announce: Announce) -> Facts:
    """Write the files of ``asked.prefix``, or resume them, and return their facts.

    Memory is bounded by a few chunks per worker. Raises UserError for an error in the input or a prefix that is taken,
    Stopped after a signal (the same command resumes), RunFailed where a worker dies.
    """
    _check_separator(asked)
    job = Job.of(
        _digests(asked.files),
        tokenizer.facts,
        asked.rules,
        append_eod=asked.append_eod,
        document_separator=asked.document_separator,
    )
    if Path(f"{asked.prefix}{FACTS}").exists():
        facts = read_facts(asked.prefix)
        if job.first_difference(facts.job) is None:
            announce(f"{asked.prefix} is already complete")
            shutil.rmtree(f"{asked.prefix}{UNFINISHED}", ignore_errors=True)  # a kill may have left it
            return facts
    output = Output(asked.prefix, job)
    if output.progress.bad_lines and not asked.skips_bad_lines:
        raise UserError(
            f"--on-bad-line stop: the unfinished {asked.prefix} has skipped {output.progress.bad_lines} bad lines; "
            f"give --on-bad-line skip to resume."
        )
    output.open()
    try:
        if not output.progress.complete:
            _make(asked, tokenizer, output, announce)
        _check_not_empty(output, asked)
        check_use(asked.rules.records.data_keys, asked.rules.records.prompt_separator, [output.progress.use], "--input")
        return output.finish()
    except OSError as error:
        raise UserError(
            f"--output-prefix {asked.prefix} cannot be written to ({error.strerror}); free some space, and run the "
            f"same command to resume."
        ) from error
    finally:
        output.close()


def _check_separator(asked: Preprocessing) -> None:
    """Refuse a separator that no text holds: each text would be one document. A right one is found at once, and texts
    with only one document need none."""
    separator = asked.document_separator
    texts = [file for file in asked.files if kind_of_file(file) == ".txt"]
    if separator is not None and not any(holds_separator(file, separator) for file in texts):
        raise UserError(
            f"--document-separator {separator} is no line of any .txt in --input, so each would be one document; "
            f"correct it, or leave it out if every line is a document."
        )


def _digests(files: tuple[Path, ...]) -> tuple[str, ...]:
    try:
        return tuple(file_digest(file) for file in files)
    except OSError as error:
        raise UserError(f"--input {error.filename} cannot be read: {error.strerror}; check the path.") from error


def _check_not_empty(output: Output, asked: Preprocessing) -> None:
    if output.progress.documents == 0:
        bad = f"{output.progress.bad_lines} bad lines were skipped" if output.progress.bad_lines else "it is empty"
        raise UserError(f"--input {' '.join(map(str, asked.files))} holds no document: {bad}.")
    output.progress.counts.check_answers(f"--input {' '.join(map(str, asked.files))}")


def _make(asked: Preprocessing, tokenizer: Tokenizer, output: Output, announce: Announce) -> None:
    """Append all chunks that the output lacks."""
    # Workers have one thread each: there is one for every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    maker = DocumentMaker(tokenizer, asked.rules, append_eod=asked.append_eod, skips=asked.skips_bad_lines)
    chunks = cut_chunks(asked.files, asked.rules.records, asked.document_separator, skips=asked.skips_bad_lines)
    position = 0
    if output.progress.chunks:
        announce(f"resuming after {output.progress.documents:,} documents")
        for chunk in islice(chunks, output.progress.chunks):
            position = chunk.position
    report = ProgressReport(
        total=sum(file.stat().st_size for file in asked.files),
        position=position,
        documents=output.progress.documents,
        log_interval=asked.log_interval,
        announce=announce,
    )
    # Forked workers have the loaded tokenizer at once. Loaded objects stay, and need no collecting here either.
    gc.freeze()
    executor = ProcessPoolExecutor(
        asked.workers, mp_context=get_context("fork"), initializer=start_worker, initargs=(maker,)
    )
    recorded = time.monotonic()
    try:
        with _noticed_signals() as noticed:
            for position, documents in _in_order(chunks, executor, _CHUNKS_PER_WORKER * asked.workers):
                output.add(documents)
                report.update(position, output.progress.documents)
                if noticed:
                    raise Stopped(
                        f"stopped by {noticed[0]} after {output.progress.documents:,} documents; run the same command "
                        f"to resume"
                    )
                if time.monotonic() - recorded >= RECORD_SECONDS:
                    output.record()
                    recorded = time.monotonic()
    except BrokenProcessPool:
        raise RunFailed(
            f"a worker was killed after {output.progress.documents:,} documents, perhaps for lack of memory; run the "
            f"same command to resume, with fewer --workers if necessary"
        ) from None
    finally:
        report.close()
        executor.shutdown(cancel_futures=True)
        gc.unfreeze()
        output.record()


def _in_order(chunks: Iterator[Chunk], executor: ProcessPoolExecutor, ahead: int) -> Iterator[tuple[int, Documents]]:
    """Yields the position and the documents of each chunk in order; workers are at most ``ahead`` chunks ahead."""
    pending: deque[tuple[int, Future[Documents]]] = deque()
    mistake: UserError | None = None
    more = True
    while more or pending:
        while more and len(pending) < ahead:
            try:
                chunk = next(chunks, None)
            except UserError as error:  # raised after everything before it in the file is reported or written
                mistake, chunk = error, None
            more = chunk is not None
            if chunk is not None:
                pending.append((chunk.position, executor.submit(make_documents, chunk)))
        if pending:
            position, future = pending.popleft()
            yield position, future.result()
    if mistake is not None:
        raise mistake


@contextmanager
def _noticed_signals() -> Iterator[list[str]]:
    """Collects the names of signals, which would otherwise end the process between two writes."""
    noticed: list[str] = []

    def notice(number: int, _: FrameType | None) -> None:
        noticed.append(signal.Signals(number).name)

    before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
