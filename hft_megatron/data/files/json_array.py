"""Records of a JSON array, without the whole file in memory."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hft_megatron.data.files.rows import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    DataStream,
    Found,
    Row,
    check_text,
    find_lines,
    too_long,
)
from hft_megatron.errors import UserError

CHUNK_BYTES = 2**20
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_LONGEST_WORD = 16
"""Longer than any JSON word or escape: an error this far from the end of the text isn't due to missing text."""


def find_in_array_or_lines(path: Path) -> Iterator[Found]:
    """The records of an array, or, where the file doesn't begin with ``[``, of JSON Lines, often called .json as well.

    Raises UserError naming file, line and record.
    """
    stream = DataStream(path)
    try:
        head = stream.read(CHUNK_BYTES, place=f"{path}:1").removeprefix(BYTE_ORDER_MARK)
        if head.lstrip().startswith(b"["):
            yield from _Array(stream, head).rows()
            return
    finally:
        stream.close()
    yield from find_lines(path)


class _Array:
    """The text of an array that has been read but not yet parsed."""

    def __init__(self, stream: DataStream, head: bytes) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1
        self._ended = False
        self._text, self._position = "", 0
        self._append(head)

    def rows(self) -> Iterator[Found]:
        self._skip_space()
        self._position += 1  # the [ that the caller has seen
        number = 1
        while True:
            mark = self._skip_space()
            if mark == "]" and number == 1:
                break
            place = f"{self._place}, record {number}"
            value, size = self._next_value(place)
            yield Found(item=Row(place=place, value=value), size=size, position=self._stream.position)
            mark = self._skip_space()
            if mark not in (",", "]"):
                found = repr(mark) if mark else "the end of the file"
                raise UserError(f"{self._place}: record {number} is followed by {found} instead of a comma or a ].")
            if mark == "]":
                break
            self._position += 1
            number += 1
        self._position += 1
        rest = self._skip_space()
        if rest:
            raise UserError(f"{self._place}: {rest!r} follows the end of the array; a .json file holds one array.")

    def _next_value(self, place: str) -> tuple[Any, int]:
        """The next record and its number of characters."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                if self._ended or _is_definite(error, len(self._text)):
                    raise UserError(f"{place}: not valid JSON ({_reason(error)}); correct the record.") from error
                if len(self._text) - self._position > MAX_RECORD_BYTES:
                    raise too_long(place, "record") from error
                # Twice as much each time, so that a long record is tried only a few times.
                self._read(max(CHUNK_BYTES, len(self._text) - self._position))
                continue
            if end - self._position > MAX_RECORD_BYTES:
                raise too_long(place, "record")
            if self._text.find("\\u", self._position, end) >= 0:
                check_text(value, place)
            size = end - self._position
            self._advance(end)
            return value, size

    def _skip_space(self) -> str:
        """Go to the next character that isn't white space, and return it; empty at the end."""
        while True:
            end = self._position
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            self._advance(end)
            if end < len(self._text) or self._ended:
                return self._text[end : end + 1]
            self._read(CHUNK_BYTES)

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._position, end)
        self._position = end

    def _read(self, size: int) -> None:
        self._append(self._stream.read(size, place=self._place))

    def _append(self, data: bytes) -> None:
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._place}: the text after it is not UTF-8; data files are text in UTF-8.") from error
        self._ended = not data
        self._text, self._position = self._text[self._position :] + more, 0

    @property
    def _place(self) -> str:
        return f"{self._stream.path}:{self._line}"


def _is_definite(error: Exception, length: int) -> bool:
    """True if more text cannot make the text a value."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated string") and error.pos + _LONGEST_WORD < length


def _reason(error: Exception) -> str:
    """The reason without the decoder's line and column, which count from the part of the file in memory."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
