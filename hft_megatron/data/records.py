"""Reads the records of a data source and says which one is wrong and why.

A file has one format: that of --data-format, or the one that its first record's keys are known by.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_megatron.config.schema import DataFormat
from hft_megatron.data.files.row import Row
from hft_megatron.data.files.rows import read_rows
from hft_megatron.data.formats.record import Record, kind_of
from hft_megatron.data.formats.table import FORMATS, recognise
from hft_megatron.data.formats.usual_names import COMPLETION_NAMES, PROMPT_NAMES
from hft_megatron.data.printable import printable
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The format of a file."""

    format: DataFormat
    since: str = ""
    """The place of the record that it was recognised by; empty where --data-format says it."""


def read_records(files: Sequence[Path], data_format: DataFormat | None) -> Iterator[tuple[DataFormat, Record]]:
    """Each record of each file in order, with its format. Raises UserError naming the file and the record's place."""
    for path in files:
        layout = None if data_format is None else Layout(format=data_format)
        for row in read_rows(path):
            if layout is None:
                layout = layout_of(row)
            yield layout.format, record_of(row, layout)


def layout_of(row: Row) -> Layout:
    """The format that the row's keys are known by. Raises UserError for one of no format."""
    value = _object(row)
    known = recognise(value)
    if known is None:
        accepted = "; ".join(format.needs for format in FORMATS.values())
        raise UserError(
            f"{row.place}: the record has {_keys_in_words(value)}, which is no known format: "
            f"{accepted}{_rename(value)}."
        )
    return Layout(format=known, since=row.place)


def record_of(row: Row, layout: Layout) -> Record:
    """The row as a record of its file's format. Raises UserError naming its place."""
    value = _object(row)
    format = FORMATS[layout.format]
    if not value.keys() >= set(format.keys):
        raise UserError(_other_keys(value, row.place, layout))
    return format.parse(value, row.place)


def _object(row: Row) -> dict[str, Any]:
    if not isinstance(row.value, dict):
        raise UserError(f"{row.place}: the record is {kind_of(row.value)}, but it must be an object with keys.")
    return row.value


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
    shown = [f"`{printable(key[:40])}`" for key in list(row)[:10]] + ["..."] * (len(row) > 10)
    return "the keys " + ", ".join(shown) if shown else "no keys"
