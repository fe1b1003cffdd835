"""JSON Lines: one value per line. A byte order mark, Windows line ends and blank lines are accepted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hft_megatron.data.files.row import Row
from hft_megatron.data.files.stream import BYTE_ORDER_MARK, DataStream
from hft_megatron.errors import UserError


def read_lines(path: Path) -> Iterator[Row]:
    """Each line's value, lines counted from 1. Raises UserError naming file and line."""
    stream = DataStream(path)
    try:
        number = 1
        while raw := stream.read_line(place=f"{path}:{number}"):
            place = f"{path}:{number}"
            text = _decode(raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw, place)
            if text.strip():
                yield Row(place=place, value=_parse(text, place))
            number += 1
    finally:
        stream.close()


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
        raise UserError(f"{place}: the line is not valid JSON ({error}); every line is one JSON object.") from error
    return value
