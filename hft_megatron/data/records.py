"""Reads the records of a data source and says which one is wrong and why.

A file has one format: that of --data-format, or the one that its first record's keys are known by.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hft_megatron.config.schema import DataFormat
from hft_megatron.data.files.rows import read_rows
from hft_megatron.data.formats.record import Record, kind_of
from hft_megatron.data.formats.table import FORMATS, recognise
from hft_megatron.data.printable import printable
from hft_megatron.errors import UserError


def read_records(files: Sequence[Path], data_format: DataFormat | None) -> Iterator[tuple[DataFormat, Record]]:
    """Each record of each file in order, with its format. Raises UserError naming the file and the record's place."""
    for path in files:
        known, first = data_format, ""
        for row in read_rows(path):
            if not isinstance(row.value, dict):
                raise UserError(f"{row.place}: the record is {kind_of(row.value)}, but it must be an object with keys.")
            if known is None:
                known, first = _recognised(row.value, row.place), row.place
            if not row.value.keys() >= set(FORMATS[known].keys):
                raise UserError(_other_keys(row.value, row.place, known, first))
            yield known, FORMATS[known].parse(row.value, row.place)


def _recognised(row: dict[str, Any], place: str) -> DataFormat:
    known = recognise(row)
    if known is None:
        accepted = "; ".join(format.needs for format in FORMATS.values())
        raise UserError(f"{place}: the record has {_keys_in_words(row)}, which is no known format: {accepted}.")
    return known


def _other_keys(row: dict[str, Any], place: str, known: DataFormat, first: str) -> str:
    needed = f"the format {known} needs {FORMATS[known].needs}"
    if first:
        return (
            f"{place}: the record has {_keys_in_words(row)}, but {needed}, and the file is in it since {first}; put "
            f"records of another format into a file of their own."
        )
    return f"{place}: the record has {_keys_in_words(row)}, but {needed}; correct --data-format or the record."


def _keys_in_words(row: dict[str, Any]) -> str:
    shown = [f"`{printable(key[:40])}`" for key in list(row)[:10]] + ["..."] * (len(row) > 10)
    return "the keys " + ", ".join(shown) if shown else "no keys"
