"""Rows of text files, one per line: JSON Lines and plain text; and the bytes of files of any kind."""

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hft_megatron.errors import UserError

MAX_RECORD_BYTES = 16 * 2**20
"""A longer record is refused before it is read whole: the longest document of TRACE has 0.2 MB, and a record of this
size would be some four million tokens."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record as plain values, as ``json.loads`` gives them."""

    place: str
    """``file:line`` or the like, the beginning of messages about the row."""
    value: Any
    kind: Literal["json", "parquet", "table"] = "json"
    """The way the file writes a missing value: without its key, as a null at any depth, or as an empty cell."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """An unparsed line of a text file, so that another process may parse it, or skip a bad one."""

    place: str
    raw: bytes
    """Bytes with the line end; cut after the longest that a line may have."""
    plain: bool = False
    """True for a document's text, False for JSON."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A row where the file gives rows, else a line."""

    item: Row | Line
    size: int
    """Approximate bytes that it takes."""
    position: int
    """Bytes of the file that were read for it and everything before it."""


def find_lines(path: Path) -> Iterator[Found]:
    """Each line that isn't blank, lines counted from 1. Raises UserError naming file and line."""
    stream = DataStream(path)
    try:
        for number, raw in stream.lines():
            if raw.strip():
                line = Line(place=f"{path}:{number}", raw=raw)
                yield Found(item=line, size=len(raw), position=stream.position)
    finally:
        stream.close()


def find_documents(path: Path, separator: str | None) -> Iterator[Found]:
    """Each document that isn't blank, with the place of its first line.

    With a ``separator`` a document ends at a line that holds nothing else. Raises UserError naming file and line.
    """
    stream = DataStream(path)
    end = None if separator is None else separator.encode()
    try:
        first, size = 1, 0
        parts: list[bytes] = []
        for number, raw in stream.lines():
            if number == 1:
                _refuse_json(raw, path)
            ends = end is None or raw.strip() == end
            # Of a document that is too long only so much is kept that its reader sees its length.
            if not (ends and end is not None) and size <= MAX_RECORD_BYTES:
                parts.append(raw)
            size += len(raw)
            if ends:
                yield from _document(path, first, parts, size, stream.position)
                first, parts, size = number + 1, [], 0
        yield from _document(path, first, parts, size, stream.position)
    finally:
        stream.close()


def holds_separator(path: Path, separator: str) -> bool:
    """True if a line of the file holds nothing else. Raises UserError naming file and line."""
    stream, end = DataStream(path), separator.encode()
    try:
        return any(raw.strip() == end for _, raw in stream.lines())
    finally:
        stream.close()


def _document(path: Path, line: int, parts: list[bytes], size: int, position: int) -> Iterator[Found]:
    raw = b"".join(parts)[: MAX_RECORD_BYTES + 1]
    if raw.strip():
        yield Found(item=Line(place=f"{path}:{line}", raw=raw, plain=True), size=size, position=position)


def _refuse_json(raw: bytes, path: Path) -> None:
    """Refuse JSON Lines under the wrong name, which would be trained as they are, braces and all."""
    try:
        is_record = raw.lstrip().startswith(b"{") and isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return
    if is_record:
        raise UserError(f"{path}:1: the line is a JSON object, but a .txt file is plain text; name the file .jsonl.")


def row_of(item: Row | Line) -> Row:
    """The row, parsed if necessary. Raises UserError naming the place of a line that isn't valid."""
    if isinstance(item, Row):
        return item
    if item.plain:
        return Row(place=item.place, value={"text": text_of_line(item).strip("\r\n")})
    return Row(place=item.place, value=_parse(text_of_line(item), item.place))


def text_of_line(line: Line) -> str:
    """The characters of a line. Raises UserError for one that is too long or isn't text."""
    if len(line.raw) > MAX_RECORD_BYTES:
        raise too_long(line.place, "line")
    return _decode(line.raw, line.place)


def _decode(raw: bytes, place: str) -> str:
    if b"\0" in raw:
        raise UserError(f"{place}: the line has a NUL byte; data files are text in UTF-8, and NUL is \\u0000 in JSON.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start + 1} of the line is not UTF-8; data files are text in UTF-8."
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            check_text(value, place)
    except (ValueError, RecursionError) as error:
        # Not the decoder's own line number, which counts from this line.
        reason = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{place}: the line is not valid JSON ({reason}); every line is one JSON object.") from error
    return value


def check_text(value: Any, place: str) -> None:
    """Refuse half of a surrogate pair: valid JSON, but not Unicode text, and tokenizers fail on it.

    Only an escape (``\\ud800``) can produce one, for UTF-8 itself has none.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the record has half of a surrogate pair (\\ud800 to \\udfff); remove it.") from error


class DataStream:
    """A file opened for reading from its beginning; ``.gz`` and ``.zst`` are decompressed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A truncated stream is an EOFError in both libraries; other damage has a class of its own in each.
        self._errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
        self._compressed = path.suffix.lower() in (".gz", ".zst")
        try:
            self._file = self._open()
        except OSError as error:
            raise UserError(f"the data file {path} cannot be read: {error.strerror}; check the path.") from error

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
        """Bytes of the file on the disk that have been read."""
        return self._raw.tell()

    def read(self, size: int, *, place: str) -> bytes:
        """Up to ``size`` bytes, none at the end. ``place`` is the position read so far, for errors."""
        return self._checked(self._file.read, size, place)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields each line with its end and its number, from 1, without a byte order mark; a line longer than
        MAX_RECORD_BYTES is cut so that its reader sees its length."""
        number = 1
        while raw := self._read_line(number):
            yield number, raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            while len(raw) > MAX_RECORD_BYTES and not raw.endswith(b"\n"):
                raw = self._read_line(number)
            number += 1

    def _read_line(self, number: int) -> bytes:
        # Without its mark, too, the first line must show that it is too long.
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
            kind = "compressed data is truncated or damaged" if self._compressed else "file cannot be read any further"
            raise UserError(f"{place}: the {kind} ({reason}); fetch or write the file again.") from error
        return data


def too_long(place: str, what: str) -> UserError:
    """The error for a record beyond the limit."""
    return UserError(f"{place}: the {what} is longer than {MAX_RECORD_BYTES // 2**20} MiB, the maximum; split it.")


def missing_package(path: Path, package: str) -> UserError:
    """The error for a file whose reader is an optional package that isn't installed."""
    return UserError(f"the data file {path} needs the package {package}; run `pip install {package}`.")


def _zstd_library(path: Path) -> Any:
    """Python's own, or its backport. Not ``zstandard``, which accepts a truncated file as complete."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise missing_package(path, "backports.zstd") from None
    return zstd
