"""A data file as rows, whatever it is written in."""

from collections.abc import Iterator
from pathlib import Path

from hft_megatron.data.files.delimited import find_in_delimited
from hft_megatron.data.files.json_array import find_in_array_or_lines
from hft_megatron.data.files.json_lines import find_lines, text_of_line, value_of
from hft_megatron.data.files.parquet import find_in_parquet
from hft_megatron.data.files.plain_text import find_documents
from hft_megatron.data.files.row import Found, Line, Row


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in its order: Parquet, a JSON array (``.json``), ``.csv``, ``.tsv``, text (``.txt``), or JSON
    Lines under any other name.

    ``.gz`` and ``.zst`` behind the name are decompressed. Raises UserError naming the place for a file that can't be
    opened or read, or isn't what its name says.
    """
    for found in find_rows(path):
        yield row_of(found.item)


def find_rows(path: Path, separator: str | None = None) -> Iterator[Found]:
    """What ``read_rows`` reads, lines not parsed yet; ``separator`` is the line between the documents of a text."""
    kind = kind_of_file(path)
    if kind == ".parquet":
        return find_in_parquet(path)
    if kind in _DELIMITERS:
        return find_in_delimited(path, _DELIMITERS[kind])
    if kind == ".txt":
        return find_documents(path, separator)
    return find_in_array_or_lines(path) if kind == ".json" else find_lines(path)


_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def kind_of_file(path: Path) -> str:
    """The suffix that says how the file is read, in small letters: what compresses it is left out."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def row_of(item: Row | Line) -> Row:
    """The row, parsed where it isn't yet. Raises UserError naming the place of a line that isn't one."""
    if isinstance(item, Row):
        return item
    if item.plain:
        return Row(place=item.place, value={"text": text_of_line(item).strip("\r\n")})
    return Row(place=item.place, value=value_of(item))
