"""Reads the records of a data source and says which one is wrong and why.

A file has one format: that of --data-format, or the one that its first record's keys are known by.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_megatron.config.schema import DataFormat
from hft_megatron.data.files.row import Row
from hft_megatron.data.files.rows import read_rows
from hft_megatron.data.formats.keys import refusal_of, without_nulls
from hft_megatron.data.formats.record import PassedOver, Record, kind_of
from hft_megatron.data.formats.table import COMPLETION_NAMES, FORMATS, PROMPT_NAMES, recognise
from hft_megatron.data.formats.weights import weigh
from hft_megatron.data.printable import printable
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The format of a file."""

    format: DataFormat
    since: str = ""
    """The place of the record that it was recognised by; empty where --data-format says it."""
    ignored: frozenset[str] = frozenset()
    """Those of --ignore-keys."""


def read_records(
    files: Sequence[Path], data_format: DataFormat | None, ignored: frozenset[str] = frozenset()
) -> Iterator[tuple[DataFormat, Record]]:
    """Each record of each file in order, with its format; keys that are ``ignored`` might as well be missing.

    Raises UserError naming the file and the record's place.
    """
    for path in files:
        layout = None if data_format is None else Layout(format=data_format, ignored=ignored)
        for row in read_rows(path):
            if layout is None:
                layout = layout_of(row, ignored)
            yield layout.format, record_of(row, layout)


def layout_of(row: Row, ignored: frozenset[str] = frozenset()) -> Layout:
    """The format that the row's keys, but for those ``ignored``, are known by.

    Raises UserError for one of no format.
    """
    value, _ = _object(row, ignored)
    known = recognise(value)
    if known is None:
        accepted = "; ".join(format.needs for format in FORMATS.values())
        raise UserError(
            f"{row.place}: the record has {_keys_in_words(row.value)}, which is no known format: "
            f"{accepted}{_rename(value)}."
        )
    return Layout(format=known, since=row.place, ignored=ignored)


def record_of(row: Row, layout: Layout) -> Record:
    """The row as a record of its file's format, with the keys that nothing was made of.

    Raises UserError naming its place, also for a key by which the record would mean something else.
    """
    value, ignored = _object(row, layout.ignored)
    format = FORMATS[layout.format]
    if not value.keys() >= set(format.keys):
        raise UserError(_other_keys(row.value, row.place, layout))
    unread = tuple(key for key in value if key not in (*format.keys, *format.reads))
    for key in unread:
        _check_unread(key, value, unread, row.place, layout.format)
    record = weigh(format.parse(value, row.place))
    return replace(record, keys=PassedOver(unread=unread, ignored=ignored))


def _object(row: Row, ignored: frozenset[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row's keys that are not null, without those ``ignored``, and which of these it has, or its messages have."""
    if not isinstance(row.value, dict):
        raise UserError(f"{row.place}: the record is {kind_of(row.value)}, but it must be an object with keys.")
    return _without(ignored, without_nulls(row.value))


def _without(ignored: frozenset[str], row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row without the ``ignored`` keys of its own and of its messages, and those that were there."""
    if not ignored:
        return row, ()
    found = ignored & row.keys()
    kept: dict[str, Any] = {}
    for key in row.keys() - found:
        turns = row[key] if isinstance(row[key], list) else [row[key]]
        found |= {name for turn in turns if isinstance(turn, dict) for name in turn.keys() & ignored}
        rest = [_but(turn, ignored) for turn in turns]
        kept[key] = rest if isinstance(row[key], list) else rest[0]
    return {key: kept[key] for key in row if key in kept}, tuple(sorted(found))


def _but(turn: Any, ignored: frozenset[str]) -> Any:
    return {key: value for key, value in turn.items() if key not in ignored} if isinstance(turn, dict) else turn


def _check_unread(key: str, row: dict[str, Any], unread: Sequence[str], place: str, format: DataFormat) -> None:
    """Raise UserError for a key by which the record would mean something else, unless it repeats what is read."""
    refusal = refusal_of(key, row[key], format)
    if refusal is None:
        return
    if refusal.may_be_a_copy:
        read = {text for name in row if name not in unread for text in _texts(row[name])}
        texts = set(_texts(row[key]))
        if texts and (texts <= read or (format == "text" and all(text in row["text"] for text in texts))):
            return
    raise UserError(
        f"{place}: `{key}` stands for {refusal.meaning}, which a record of the format {format} has no place for; "
        f"{refusal.fix}, or pass over it with --ignore-keys {key}."
    )


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _other_keys(row: dict[str, Any], place: str, layout: Layout) -> str:
    needed = f"the format {layout.format} needs {FORMATS[layout.format].needs}"
    if layout.since:
        return (
            f"{place}: the record has {_keys_in_words(row)}, but {needed}, and the file is in it since {layout.since}; "
            f"put records of another format into a file of their own."
        )
    return f"{place}: the record has {_keys_in_words(row)}, but {needed}; correct --data-format or the record."


def _rename(row: dict[str, Any]) -> str:
    """Which keys to rename, where there is no doubt which are the prompt and its completion."""
    halves = [[key for key in row if key in names] for names in (PROMPT_NAMES, COMPLETION_NAMES)]
    if any(len(keys) != 1 for keys in halves):
        return ""
    pairs = zip((keys[0] for keys in halves), ("prompt", "completion"), strict=True)
    return ". Rename " + " and ".join(f"`{key}` to `{name}`" for key, name in pairs if key != name)


def _keys_in_words(row: dict[str, Any]) -> str:
    shown = [f"`{printable(key[:40])}`{' (null)' * (row[key] is None)}" for key in list(row)[:10]]
    shown += ["..."] * (len(row) > 10)
    return "the keys " + ", ".join(shown) if shown else "no keys"
