"""Cuts the input into chunks that depend on the input alone, so that neither workers nor restarts change the output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hft_megatron.data.files.row import Found, Line, Row
from hft_megatron.data.files.rows import find_rows, row_of
from hft_megatron.data.records import Layout, RecordReader, RecordRules
from hft_megatron.errors import UserError

CHUNK_ROWS = 1000
CHUNK_BYTES = 2**20
"""A chunk ends with the row that reaches one of these."""


@dataclass(kw_only=True)
class Chunk:
    """Rows of one file that one worker makes documents of."""

    layout: Layout | None
    """None while no row of the file had a known format."""
    rows: list[Row | Line] = field(default_factory=list)
    position: int = 0
    """Bytes of all input that were read for it and all before it."""


def cut_chunks(files: Sequence[Path], rules: RecordRules, separator: str | None, *, skips: bool) -> Iterator[Chunk]:
    """The chunks of all files in order. Raises UserError for a file that can't be read on.

    A file's format is that of its first record; where bad ones are passed over (``skips``), of its first good one.
    """
    before, reader = 0, RecordReader(rules)
    for path in files:
        layout = None if rules.data_format is None else Layout(format=rules.data_format)
        chunk, size = Chunk(layout=layout), 0
        for found in find_rows(path, separator):
            if layout is None:
                chunk.layout = layout = _layout(reader, found, skips=skips)
            chunk.rows.append(found.item)
            chunk.position = before + found.position
            size += found.size
            if len(chunk.rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = Chunk(layout=layout), 0
        before += path.stat().st_size
        if chunk.rows:
            yield chunk


def _layout(reader: RecordReader, found: Found, *, skips: bool) -> Layout | None:
    try:
        return reader.layout_of(row_of(found.item))
    except UserError:
        if not skips:
            raise
        return None
