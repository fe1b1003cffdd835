"""Megatron's .bin and .idx files, checked.

megatron-core maps both files and trusts them, so an error in them is a crash somewhere inside or, worse, goes
unnoticed. Here every byte is read once, before a model is built.
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hft_megatron.errors import UserError

HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("document_ends", "<u8")])
"""The beginning of an .idx file (megatron.core.datasets.indexed_dataset). It is followed by an int32 length per
sequence, an int64 byte offset per sequence, and an int64 per entry of the table of documents."""
MAGIC = b"MMIDIDX"
TokenType = type[np.integer[Any]]
TOKEN_TYPES: dict[int, TokenType] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""megatron-core's codes of whole numbers; a file of 6 or 7 holds fractions."""
READ_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusFiles:
    """Facts about a source, from its files."""

    prefix: str
    sequence_lengths: NDArray[np.int32]
    """Tokens of each sequence, which --split divides and megatron-core shuffles; shape (sequences,)."""
    digest: str
    """Digest of both files: SHA-256 of the index, and of the CRC-32 of every 64 MiB of the tokens."""
    has_end: bool
    """True if the token that was asked for is in them."""


def read_corpus_files(
    prefix: str, vocab_size: int, end: int | None = None, *, option: str = "--data-path"
) -> CorpusFiles:
    """Reads and checks PREFIX.idx and PREFIX.bin, which ``option`` names, and looks for the token ``end``; about 3 GB/s
    where a processor is the limit.

    Raises UserError for files that are missing, cut short, damaged or of two corpora, and for a token id that is not
    below ``vocab_size``.
    """
    index, tokens = _both_files(prefix, option)
    try:
        content = np.fromfile(index, dtype=np.uint8)
        token_type, lengths = _read_index(index, content)
        described = int(lengths.sum(dtype=np.int64)) * np.dtype(token_type).itemsize
        held = tokens.stat().st_size
        if held != described:
            raise UserError(
                f"{tokens} has {held} bytes, but {index.name} describes {described}: one of them was cut short or "
                f"belongs to another corpus; copy both files again."
            )
        checksums, has_end = _check_ids(tokens, token_type, vocab_size, end)
    except OSError as error:
        raise UserError(f"{option} {prefix} cannot be read: {error.strerror}.") from None
    digest = hashlib.sha256(content.data)
    digest.update(repr(checksums).encode())
    return CorpusFiles(prefix=prefix, sequence_lengths=lengths, digest=digest.hexdigest(), has_end=has_end)


def _both_files(prefix: str, option: str) -> tuple[Path, Path]:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [path for path in (index, tokens) if not path.is_file()]
    if len(missing) == 1:
        there = tokens if missing[0] is index else index
        raise UserError(f"{option} {prefix}: {missing[0]} is missing, and {there.name} is there; copy both files.")
    if missing and Path(prefix).suffix in (".bin", ".idx"):
        raise UserError(f"{option} {prefix} names one of two files; give {prefix[:-4]}, which names both.")
    if missing:
        raise UserError(
            f"{option} {prefix}: there are no files {index} and {tokens}; make them with "
            f"tools/preprocess_data.py, and give their path without .idx and .bin."
        )
    return index, tokens


def _read_index(path: Path, content: NDArray[np.uint8]) -> tuple[TokenType, NDArray[np.int32]]:
    """Type of the tokens and length of each sequence."""
    damaged = UserError(f"{path} is damaged or not an index of megatron-core; make or copy it and its .bin again.")
    if content.nbytes < HEADER.itemsize:
        raise damaged
    [header] = content[: HEADER.itemsize].view(HEADER)
    sequences, document_ends = int(header["sequences"]), int(header["document_ends"])
    token_type = TOKEN_TYPES.get(int(header["code"]))
    # NumPy's fixed-width bytes exclude the zeros at the end.
    if header["magic"] != MAGIC or header["version"] != 1 or token_type is None:
        raise damaged
    if content.nbytes != HEADER.itemsize + sequences * (4 + 8) + document_ends * 8:
        raise damaged
    tables = content[HEADER.itemsize :].data
    lengths = np.frombuffer(tables, np.int32, sequences).copy()
    offsets = np.frombuffer(tables, np.int64, sequences, offset=4 * sequences)
    documents = np.frombuffer(tables, np.int64, document_ends, offset=12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(token_type).itemsize
    sound = (
        sequences > 0
        and lengths.min() >= 0
        and offsets[0] == 0
        and np.array_equal(offsets[1:], ends[:-1])
        and document_ends > 0
        and documents[0] == 0
        and documents[-1] == sequences
        and bool((np.diff(documents) >= 0).all())
    )
    if not sound:
        raise damaged
    return token_type, lengths


def _check_ids(path: Path, token_type: TokenType, vocab_size: int, end: int | None) -> tuple[list[int], bool]:
    """The CRC-32 of every ``READ_BYTES`` of the tokens, and whether ``end`` is among them; all ids must be rows of the
    model's vocabulary."""
    checksums, before, count = [], 0, READ_BYTES // np.dtype(token_type).itemsize
    has_end = False
    with path.open("rb") as file:
        while (ids := np.fromfile(file, dtype=token_type, count=count)).size:
            wrong = ids.max() >= vocab_size or ids.min() < 0
            if wrong:
                place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
                raise UserError(
                    f"{path} holds the id {ids[place]} (token {before + place}), but the model's vocabulary has "
                    f"{vocab_size} rows; use a corpus that was made with the model's tokenizer."
                )
            has_end = has_end or (end is not None and bool((ids == end).any()))
            checksums.append(zlib.crc32(ids.data))
            before += ids.size
    return checksums, has_end
