"""JSON Lines: one value per line. A byte order mark, Windows line ends and blank lines are accepted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hft_megatron.data.files.row import Found, Line
from hft_megatron.data.files.stream import MAX_RECORD_BYTES, DataStream, too_long
from hft_megatron.errors import UserError


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


def value_of(line: Line) -> Any:
    """What the JSON of a line says. Raises UserError."""
    return _parse(text_of_line(line), line.place)


def text_of_line(line: Line) -> str:
    """The characters of a line. Raises UserError for one that is too long or isn't text."""
    if len(line.raw) > MAX_RECORD_BYTES:
        raise too_long(line.place, "line")
    return _decode(line.raw, line.place)


def check_text(value: Any, place: str) -> None:
    """Refuse half of a surrogate pair: valid JSON, but no Unicode text, and tokenizers stop at it.

    Only an escape (``\\ud800``) can bring one, for UTF-8 itself has none.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the record has half of a surrogate pair (\\ud800 to \\udfff); remove it.") from error


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
        # Not the decoder's own line, which counts from this one.
        reason = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{place}: the line is not valid JSON ({reason}); every line is one JSON object.") from error
    return value
