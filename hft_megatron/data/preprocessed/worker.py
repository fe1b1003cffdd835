"""What a worker process does: the rows of a chunk become documents."""

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

from hft_megatron.config.schema import DataFormat
from hft_megatron.data.chat import ChatTemplate
from hft_megatron.data.examples import Example, example_of, pieces_of
from hft_megatron.data.files.row import Line, Row
from hft_megatron.data.files.rows import row_of
from hft_megatron.data.fitting import ExampleRules, SftCounts, check_predicts, spans_of
from hft_megatron.data.formats.record import Record
from hft_megatron.data.preprocessed.chunks import Chunk
from hft_megatron.data.preprocessed.index_file import token_dtype
from hft_megatron.data.records import layout_of, record_of
from hft_megatron.data.tokenizer import Piece, Tokenizer
from hft_megatron.errors import UserError


@dataclass(kw_only=True)
class Documents:
    """A chunk's output."""

    tokens: NDArray[np.generic]
    loss_mask: NDArray[np.generic]
    """uint8."""
    boundaries: NDArray[np.int32]
    """Start and stop of each example within its document, end to end."""
    lengths: NDArray[np.int32]
    """Tokens of each document."""
    boundary_counts: NDArray[np.int32]
    """Numbers in ``boundaries`` of each document."""
    counts: SftCounts
    formats: frozenset[DataFormat]
    longest: int
    """Positions of the longest document; 0 without one."""
    bad: list[str] = field(default_factory=list)
    """A line of JSON for each row that was passed over."""


class DocumentMaker:
    """Makes documents of chunks, one after the other."""

    def __init__(self, tokenizer: Tokenizer, rules: ExampleRules, *, append_eod: bool, skips: bool) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._append_eod = append_eod
        self._skips = skips
        self._template = ChatTemplate(tokenizer.facts, rules.loss)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def documents(self, chunk: Chunk) -> Documents:
        """All documents of a chunk. Raises UserError naming the first bad row, unless those are passed over."""
        bad: list[str] = []
        kept = list(self._kept(chunk, bad))
        spans = [spans_of(example, self._rules) for example in kept]
        counts = SftCounts()
        for example, of_example in zip(kept, spans, strict=True):
            counts.add(example, of_example, self._rules)
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
            bad=bad,
        )

    def _kept(self, chunk: Chunk, bad: list[str]) -> Iterator[Example]:
        found: list[tuple[Row | Line, DataFormat, Record, list[Piece]]] = []
        refused: list[tuple[Row | Line, UserError]] = []
        for item in chunk.rows:
            try:
                known, record, pieces = self._pieces(item, chunk)
            except UserError as error:
                refused.append((item, error))
                if not self._skips:
                    break
            else:
                found.append((item, known, record, pieces))
        encoded = self._tokenizer.encode_pieces([pieces for *_, pieces in found])
        for (item, known, record, pieces), of_record in zip(found, encoded, strict=True):
            example = example_of(record, known, pieces, of_record, self._template, self._rules.loss)
            try:
                check_predicts(example)
            except UserError as error:
                if not self._skips:
                    raise _with_the_option(error) from None
                refused.append((item, error))
            else:
                yield example
        if refused and not self._skips:
            raise _with_the_option(refused[0][1])
        order = {item.place: number for number, item in enumerate(chunk.rows)}
        bad += [_bad_line(item, error) for item, error in sorted(refused, key=lambda pair: order[pair[0].place])]

    def _pieces(self, item: Row | Line, chunk: Chunk) -> tuple[DataFormat, Record, list[Piece]]:
        row = row_of(item)
        layout = layout_of(row, frozenset(self._rules.ignore_keys)) if chunk.layout is None else chunk.layout
        record = record_of(row, layout)
        pieces = pieces_of(record, self._tokenizer, self._template, self._rules.loss)
        if layout.format == "text" and not self._append_eod:
            pieces = pieces[:-1]
        return layout.format, record, pieces


def _joined(arrays: Sequence[NDArray[np.generic]], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype=dtype)


def _with_the_option(error: UserError) -> UserError:
    return UserError(f"{str(error).removesuffix('.')}; or pass over it with --on-bad-line skip.")


def _bad_line(item: Row | Line, error: UserError) -> str:
    record = item.raw.decode("utf-8", "backslashreplace") if isinstance(item, Line) else item.value
    return json.dumps({"error": str(error), "record": record}, default=str) + "\n"


_maker: DocumentMaker | None = None
"""The worker's own; set once, when it starts."""


def start_worker(maker: DocumentMaker) -> None:
    """Called first in every worker, which ends with its parent and leaves signals to it."""
    global _maker
    _maker = maker
    gc.freeze()  # or every collection would walk through all that the parent has imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def make_documents(chunk: Chunk) -> Documents:
    """What a worker is asked for."""
    assert _maker is not None
    return _maker.documents(chunk)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
