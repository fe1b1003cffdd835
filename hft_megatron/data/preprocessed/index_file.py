"""The files of preprocessed data: one for each chunk, and the index of them.

megatron-core's own classes hold Python lists of all documents while they write, assert instead of naming the damage,
and need torch, without which ``show-data`` and preprocessing start. Tests compare files with megatron-core's both ways.

Layout, little-endian: magic, version (8 bytes), code of the data type (1), sequences (8), documents plus one (8); then
each sequence's length (int32), its first byte in ``.bin`` (int64), and the sequence that each document begins with, and
the end (int64). Here every sequence is a document.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.files.rows import Found, Line, Row, row_of
from hft_megatron.data.files.sources import find_rows
from hft_megatron.data.records import Layout, RecordReader, RecordRules
from hft_megatron.errors import UserError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""megatron-core's numbers of the integer types."""
_BLOCK = 1 << 20
"""Documents that are processed together; bounds memory."""


def token_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """The type of token ids that megatron-core chooses for a vocabulary."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def write_index(path: Path, dtype: np.dtype[np.generic], lengths_file: Path) -> None:
    """Write the index of documents whose lengths (int32) are the contents of ``lengths_file``, block by block."""
    [code] = [code for code, known in _CODES.items() if known == dtype]
    documents = lengths_file.stat().st_size // 4
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, documents, documents + 1))
        for lengths in _blocks(lengths_file):
            file.write(lengths.tobytes())
        start = 0
        for lengths in _blocks(lengths_file):
            starts, start = _starts(lengths, start, dtype.itemsize)
            file.write(starts.tobytes())
        for first in range(0, documents + 1, _BLOCK):
            file.write(np.arange(first, min(first + _BLOCK, documents + 1), dtype=np.int64).tobytes())


def open_documents(prefix: str) -> tuple[NDArray[np.int32], NDArray[np.generic]]:
    """Length of each document (documents,) and all their values end to end (values,), both memory-mapped.

    Raises UserError where one of the two files is missing, the index is damaged or of another kind, or the number of
    values differs from it.
    """
    index, values = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path, other in ((index, values), (values, index)):
        if not path.is_file():
            raise UserError(f"{path} is missing; copy it beside {other.name}, or preprocess the data again.")
    dtype, documents = _read_header(index)
    lengths = np.memmap(index, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(documents,))
    begins = np.memmap(index, dtype=np.int64, mode="r", offset=_HEADER.size + 4 * documents, shape=(documents,))
    total = 0
    for first in range(0, documents, _BLOCK):
        block = np.asarray(lengths[first : first + _BLOCK])
        expected, total = _starts(block, total, dtype.itemsize)
        if int(block.min()) < 0 or not np.array_equal(expected, begins[first : first + _BLOCK]):
            raise _damaged(index, f"lengths and positions contradict each other after document {first}")
    size = values.stat().st_size
    if size != total:
        raise UserError(
            f"{values} has {size} bytes, but by {index.name} it has {total}; copy both again, or preprocess the data "
            f"again."
        )
    return lengths, np.memmap(values, dtype=dtype, mode="r")


def _read_header(index: Path) -> tuple[np.dtype[np.generic], int]:
    with index.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise _damaged(index, "it does not begin like an index of megatron-core")
    _, version, code, documents, ends = _HEADER.unpack(head)
    if version != _VERSION or code not in _CODES:
        raise _damaged(index, f"it has version {version} and data type {code}")
    if ends != documents + 1:
        raise _damaged(index, f"it has {documents} sequences in {ends - 1} documents, not one in each")
    size, expected = index.stat().st_size, _HEADER.size + 12 * documents + 8 * ends
    if size != expected or documents == 0:
        raise _damaged(index, f"it has {size} bytes, but {expected} by the {documents} documents in its header")
    return np.dtype(_CODES[code]), documents


def _damaged(index: Path, reason: str) -> UserError:
    return UserError(f"{index} is damaged or of another kind: {reason}; copy it again, or preprocess the data again.")


def _starts(lengths: NDArray[np.int32], start: int, itemsize: int) -> tuple[NDArray[np.int64], int]:
    """The first byte of each document of a block that starts at ``start``, and the one after the block."""
    ends = start + np.cumsum(lengths, dtype=np.int64) * itemsize
    return np.concatenate([[start], ends[:-1]]).astype(np.int64, copy=False), int(ends[-1])


def _blocks(path: Path) -> Iterator[NDArray[np.int32]]:
    with path.open("rb") as file:
        while block := file.read(4 * _BLOCK):
            yield np.frombuffer(block, dtype=np.int32)


CHUNK_ROWS = 1000
CHUNK_BYTES = 2**20
"""Size of a chunk, which ends with the row that reaches a multiple of it."""


@dataclass(kw_only=True)
class Chunk:
    """Rows of one file that one worker makes into documents."""

    layout: Layout | None
    """None if no row of the file had a known format yet."""
    rows: list[Row | Line] = field(default_factory=list)
    position: int = 0
    """Bytes of all input that were read for it and everything before it."""


def cut_chunks(files: Sequence[Path], rules: RecordRules, separator: str | None, *, skips: bool) -> Iterator[Chunk]:
    """The chunks of all files in order. Raises UserError for a file that cannot be read to its end.

    A file's format is that of its first record; where bad ones are skipped (``skips``), of its first good one.
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
