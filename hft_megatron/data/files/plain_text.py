"""Plain text (``.txt``): one document per line, as ``datasets`` reads it, or documents between separator lines."""

import json
from collections.abc import Iterator
from pathlib import Path

from hft_megatron.data.files.row import Found, Line
from hft_megatron.data.files.stream import MAX_RECORD_BYTES, DataStream
from hft_megatron.errors import UserError


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
            # Of a document that is too long only so much is kept that its reader sees it is.
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
    """Whether a line of the file holds nothing else. Raises UserError naming file and line."""
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
    """JSON Lines under the wrong name would be trained as they stand, braces and all."""
    try:
        is_record = raw.lstrip().startswith(b"{") and isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return
    if is_record:
        raise UserError(f"{path}:1: the line is a JSON object, but a .txt file is plain text; name the file .jsonl.")
