"""Reads a JSONL file of conversations or prompt/completion pairs, and says which line is wrong and why.

Blank lines, a byte order mark and Windows line ends are accepted; everything else must be right.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_megatron.errors import UserError

ROLES = ("system", "user", "assistant")
ACCEPTED = "`messages`, or `prompt` and `completion`"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; keys of a message other than ``role`` and ``content`` are for the chat template."""

    line: int
    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and what should follow it, both as they are: nothing is put between them."""

    line: int
    prompt: str
    completion: str


Record = Chat | Completion


def read_records(path: Path) -> Iterator[Record]:
    """Each record with its line number, counted from 1. Raises UserError naming file and line."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"the data file {path} can't be read: {error.strerror}; check --train-data-path and --valid-data-path."
        ) from error
    with file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, place)
            if text.strip():
                yield _parse(text, place, number)


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start + 1} of the line is not UTF-8; data files are plain JSONL in UTF-8."
        ) from error


def _parse(text: str, place: str, line: int) -> Record:
    try:
        row = json.loads(text)
        # A lone surrogate is valid JSON but no Unicode text, and tokenizers stop at it.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the line has half of a surrogate pair (\\ud800 to \\udfff); remove it.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: the line is not valid JSON ({error}); every line is one JSON object.") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: the line holds {_kind(row)}, but every line is one JSON object with {ACCEPTED}.")
    if "messages" in row:
        return Chat(line=line, messages=_messages(row["messages"], place))
    if "prompt" in row and "completion" in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str):
                raise UserError(f"{place}: `{key}` is {_kind(row[key])}, but it must be text.")
        return Completion(line=line, prompt=row["prompt"], completion=row["completion"])
    keys = ", ".join(f"`{key}`" for key in row) or "none"
    raise UserError(f"{place}: the record has the keys {keys}, but it needs {ACCEPTED}.")


def _messages(messages: object, place: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: `messages` is {_kind(messages)}, but it must be a list of at least one message.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{place}: message {number} is {_kind(message)}, but it must be an object with a role.")
        if message.get("role") not in ROLES:
            raise UserError(
                f"{place}: message {number} has the role {message.get('role')!r}, but it must be one of "
                f"{', '.join(ROLES)}."
            )
        if not isinstance(message.get("content"), str):
            kind = _kind(message["content"]) if "content" in message else "missing"
            raise UserError(f"{place}: the `content` of message {number} is {kind}, but it must be text.")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place}: the conversation has no assistant turn, so there is nothing to learn; remove it.")
    return tuple(messages)


def _kind(value: object) -> str:
    """What JSON calls the value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names: dict[type, str] = {bool: "a truth value", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names[type(value)]
