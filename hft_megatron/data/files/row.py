"""A row of a file, and the bytes that rows are read from: plain, compressed, with their digest."""

import gzip
import hashlib
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record as plain values: what ``json.loads`` gives."""

    place: str
    """``file:line`` or the like, which stands in front of a sentence about the row."""
    value: Any
    kind: Literal["json", "parquet", "table"] = "json"
    """How the file writes what is missing: without its key, as a null at any depth, or as an empty cell."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a text file that is not parsed yet, so that another process may do it, or pass over a bad one."""

    place: str
    raw: bytes
    """With its end; cut behind the longest that a line may have."""
    plain: bool = False
    """Whether it is a document's text and not JSON."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A row where its file makes it one, else a line."""

    item: Row | Line
    size: int
    """Bytes that it takes, about."""
    position: int
    """Bytes of the file that were read for it and all before it."""


FACTS, LOSS_MASK, BOUNDARIES = "_preprocessed.json", "_loss_mask", "_boundaries"
"""The companions of PREFIX.bin and PREFIX.idx; the last two are .bin and .idx as well."""
UNFINISHED, BAD_LINES = "_unfinished", "_bad_lines.jsonl"
"""The folder of what isn't complete, and the records that were passed over."""


def is_prefix(path: str) -> bool:
    """Whether the names of preprocessed data, complete or not, begin so."""
    return any(Path(f"{path}{end}").exists() for end in (".idx", ".bin", FACTS, UNFINISHED))


def file_digest(path: Path) -> str:
    """sha256 (hex) of the file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


MAX_RECORD_BYTES = 16 * 2**20
"""A longer record is refused before it is read whole: the longest document of TRACE has 0.2 MB, and a record of this
size would be some four million tokens."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def missing_package(path: Path, package: str) -> UserError:
    """The sentence for a file whose reader is an optional package that isn't installed."""
    return UserError(f"the data file {path} needs the package {package}; run `pip install {package}`.")


class DataStream:
    """A file opened for reading from its beginning; ``.gz`` and ``.zst`` are decompressed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A cut-off stream is an EOFError in both libraries; other damage has a class of its own in each.
        self._errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
        self._compressed = path.suffix.lower() in (".gz", ".zst")
        try:
            self._file = self._open()
        except OSError as error:
            raise UserError(f"the data file {path} can't be read: {error.strerror}; check the path.") from error

    def _open(self) -> Any:
        suffix = self.path.suffix.lower()
        zstd = _zstd_library(self.path) if suffix == ".zst" else None
        self._raw = self.path.open("rb")
        if suffix == ".gz":
            return gzip.open(self._raw, "rb")
        if zstd is not None:
            self._errors = (*self._errors, zstd.ZstdError)
            return zstd.open(self._raw, "rb")
        return self._raw

    @property
    def position(self) -> int:
        """Bytes of the file, as it lies on the disk, that have been read."""
        return self._raw.tell()

    def read(self, size: int, *, place: str) -> bytes:
        """Up to ``size`` bytes, none at the end. ``place`` is where the file has been read to, for the error."""
        return self._checked(self._file.read, size, place)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line with its end and its number, from 1, without a byte order mark; of one that is longer than
        MAX_RECORD_BYTES only so much that its reader sees it is."""
        number = 1
        while raw := self._read_line(number):
            yield number, raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            while len(raw) > MAX_RECORD_BYTES and not raw.endswith(b"\n"):
                raw = self._read_line(number)
            number += 1

    def _read_line(self, number: int) -> bytes:
        # Without its mark, too, the first line must be seen to be too long.
        size = MAX_RECORD_BYTES + 1 + len(BYTE_ORDER_MARK)
        return self._checked(self._file.readline, size, f"{self.path}:{number}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    def _checked(self, read: Any, size: int, place: str) -> bytes:
        try:
            data: bytes = read(size)
        except self._errors as error:
            reason = " ".join(str(error).split())
            kind = "compressed data is cut off or damaged" if self._compressed else "file can't be read on"
            raise UserError(f"{place}: the {kind} ({reason}); fetch or write the file again.") from error
        return data


def too_long(place: str, what: str) -> UserError:
    """The sentence for a record beyond the limit."""
    return UserError(
        f"{place}: the {what} is longer than {MAX_RECORD_BYTES // 2**20} MiB, the most that one may have; split it."
    )


def _zstd_library(path: Path) -> Any:
    """Python's own, or its backport. Not ``zstandard``: that takes a cut-off file for a complete one."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise missing_package(path, "backports.zstd") from None
    return zstd
