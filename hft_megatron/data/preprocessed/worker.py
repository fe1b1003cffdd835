"""Work of a worker process: the rows of a chunk become documents."""

import gc
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.names import DataFormat
from hft_megatron.data.chat import ChatTemplate
from hft_megatron.data.examples import Example, ExampleRules, SftCounts, check_predicts, example_of, pieces_of, spans_of
from hft_megatron.data.files.rows import Line, Row, row_of
from hft_megatron.data.formats.table import Record
from hft_megatron.data.preprocessed.index_file import Chunk, token_dtype
from hft_megatron.data.record_errors import RecordErrors, RecordRefused, RecordUse
from hft_megatron.data.records import RecordReader
from hft_megatron.data.tokenizer import Piece, Tokenizer
from hft_megatron.errors import UserError


@dataclass(kw_only=True)
class Documents:
    """A chunk's output."""

    tokens: NDArray[np.generic]
    loss_mask: NDArray[np.generic]
    """Mask, uint8."""
    boundaries: NDArray[np.int32]
    """Start and stop of each example within its document, end to end."""
    lengths: NDArray[np.int32]
    """Tokens of each document."""
    boundary_counts: NDArray[np.int32]
    """Number of entries in ``boundaries`` of each document."""
    counts: SftCounts
    formats: frozenset[DataFormat]
    longest: int
    """Positions of the longest document; 0 without one."""
    use: RecordUse
    """Account of all chunks of the worker so far."""
    bad: list[str] = field(default_factory=list)
    """A line of JSON for each row that was skipped."""


class DocumentMaker:
    """Makes chunks into documents, one after the other."""

    def __init__(self, tokenizer: Tokenizer, rules: ExampleRules, *, append_eod: bool, skips: bool) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._append_eod = append_eod
        self._skips = skips
        self._reader = RecordReader(rules.records)
        self._template = ChatTemplate(tokenizer.facts, rules.loss)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def documents(self, chunk: Chunk) -> Documents:
        """All documents of a chunk. Raises UserError with the errors in it, unless bad rows are skipped."""
        refused: list[tuple[Row | Line, UserError]] = []
        kept = list(self._kept(chunk, refused))
        spans, counts, too_long = [], SftCounts(), RecordErrors()
        for example in kept:
            try:
                spans.append(spans_of(example, self._rules))
            except RecordRefused as error:
                too_long.add(example.place, error)
            else:
                counts.add(example, spans[-1], self._rules)
        self._stop_if_needed(refused, too_long)
        order = {item.place: number for number, item in enumerate(chunk.rows)}
        refused.sort(key=lambda pair: order[pair[0].place])
        lengths = np.array([len(example.ids) for example in kept], dtype=np.int32)
        return Documents(
            tokens=_joined([example.ids for example in kept], self._dtype),
            loss_mask=_joined([example.trained for example in kept], np.dtype(np.uint8)),
            boundaries=np.array([span for of_example in spans for span in of_example], dtype=np.int32).reshape(-1),
            lengths=lengths,
            boundary_counts=np.array([2 * len(of_example) for of_example in spans], dtype=np.int32),
            counts=counts,
            formats=frozenset(example.format for example in kept),
            longest=int(lengths.max(initial=1)) - 1,
            use=self._reader.use(),
            bad=[_bad_line(item, error) for item, error in refused],
        )

    def _stop_if_needed(self, refused: Sequence[tuple[Row | Line, UserError]], too_long: RecordErrors) -> None:
        """Raise UserError where a record is too long, or is refused and may not be skipped."""
        errors = RecordErrors()
        for item, error in [] if self._skips else refused:
            errors.add(item.place, error)
        told = [f"{errors.told().removesuffix('.')}; or skip it with --on-bad-line skip."] * (len(errors) > 0)
        told += [too_long.told()] * (len(too_long) > 0)
        if told:
            raise UserError(" ".join(told))

    def _kept(self, chunk: Chunk, refused: list[tuple[Row | Line, UserError]]) -> Iterator[Example]:
        """The examples of the chunk's rows in order; rows that cannot be one are added to ``refused``."""
        found: list[tuple[Row | Line, DataFormat, Record, list[Piece]]] = []
        for item in chunk.rows:
            try:
                known, record, pieces = self._pieces(item, chunk)
            except UserError as error:
                refused.append((item, error))
            else:
                found.append((item, known, record, pieces))
        encoded = self._tokenizer.encode_pieces([pieces for *_, pieces in found])
        for (item, known, record, pieces), of_record in zip(found, encoded, strict=True):
            example = example_of(record, known, pieces, of_record, self._template, self._rules.loss)
            try:
                check_predicts(example)
            except UserError as error:
                refused.append((item, error))
            else:
                yield example

    def _pieces(self, item: Row | Line, chunk: Chunk) -> tuple[DataFormat, Record, list[Piece]]:
        row = row_of(item)
        layout = self._reader.layout_of(row) if chunk.layout is None else chunk.layout
        record = self._reader.record_of(row, layout)
        pieces = pieces_of(record, self._tokenizer, self._template, self._rules.loss)
        if layout.format == "text" and not self._append_eod:
            pieces = pieces[:-1]
        return layout.format, record, pieces


def _joined(arrays: Sequence[NDArray[np.generic]], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype=dtype)


def _bad_line(item: Row | Line, error: UserError) -> str:
    record = item.raw.decode("utf-8", "backslashreplace") if isinstance(item, Line) else item.value
    return json.dumps({"error": str(error), "record": record}, default=str) + "\n"


_maker: DocumentMaker | None = None
"""The worker's own; set once, when it starts."""


def start_worker(maker: DocumentMaker) -> None:
    """Called first in every worker, which ends with its parent and leaves signals to it."""
    global _maker
    _maker = maker
    gc.freeze()  # or every collection would walk through everything that the parent has imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def make_documents(chunk: Chunk) -> Documents:
    """The task of a worker."""
    assert _maker is not None
    return _maker.documents(chunk)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
