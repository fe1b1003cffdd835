"""Rows of tables: CSV, TSV and Parquet."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hft_megatron.data.files.rows import (
    MAX_RECORD_BYTES,
    DataStream,
    Found,
    Line,
    Row,
    missing_package,
    text_of_line,
    too_long,
)
from hft_megatron.errors import UserError


def find_in_delimited(path: Path, delimiter: str, names: Sequence[str] = ()) -> Iterator[Found]:
    """Yields each row that isn't blank, with the line that it begins in; cells in quotes may hold line ends.

    ``names`` are the columns of a file whose first line is already a row; otherwise the first line has them. Raises
    UserError naming file and line: for two columns of one name, for a row with more or fewer cells than columns, for a
    wrong quote, for a tab or a line end within quotes in a tab-separated file, and for a cell beyond the limit of a
    record.
    """
    stream = DataStream(path)
    # This is the process's own limit: the default of 128 KiB is less than a document may have.
    csv.field_size_limit(MAX_RECORD_BYTES)
    reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
    columns = list(names)
    before = position = 0
    try:
        while (cells := _next(reader, place := f"{path}:{before + 1}")) is not None:
            before = reader.line_num
            if not cells:
                continue
            if delimiter == "\t":
                _check_cells(cells, place)
            if not columns:
                columns = _checked_columns(cells, place)
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{place}: the row has {len(cells)} cells, but the file has {len(columns)} columns "
                    f"({', '.join(columns)}); {_ADVICE[delimiter]}."
                )
            size = max(1, stream.position - position)
            position = stream.position
            value = dict(zip(columns, cells, strict=True))
            yield Found(item=Row(place=place, value=value, kind="table"), size=size, position=position)
    finally:
        stream.close()


_ADVICE = {
    ",": "put a cell that holds a line end, a quote or a comma in quotes",
    "\t": "write cells that hold a line end or a tab as .csv or JSON Lines",
}


def _check_cells(cells: Sequence[str], place: str) -> None:
    """Raise UserError for a cell of a ``.tsv`` that continues after a tab or a line end.

    Some programs put such cells in quotes, and for others a quote is an ordinary character, so that two cells whose
    texts begin and end with one would become one, together with everything between them.
    """
    for number, cell in enumerate(cells, start=1):
        if any(end in cell for end in "\t\r\n"):
            raise UserError(
                f"{place}: cell {number} begins with a quote and would continue after a tab or a line end, to "
                f"{cell[-20:]!r}; if that is meant, write the table as .csv or JSON Lines, else put the "
                f"cell in quotes with its own quotes doubled."
            )


def _lines(stream: DataStream) -> Iterator[str]:
    for number, raw in stream.lines():
        yield text_of_line(Line(place=f"{stream.path}:{number}", raw=raw))


def _next(reader: Any, place: str) -> list[str] | None:
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        if "field limit" in str(error):
            raise too_long(place, "cell") from error
        raise UserError(
            f"{place}: the row cannot be read ({error}); put a cell that holds a quote in quotes, with the quote "
            f"doubled."
        ) from error
    return row


def _checked_columns(names: list[str], place: str) -> list[str]:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{place}: {count} columns have the name {name!r}; give each column its own name.")
    return names


ROWS_PER_READ = 256


def find_in_parquet(path: Path) -> Iterator[Found]:
    """Yields each row with its number, from 1. Raises UserError for a file that pyarrow cannot read, for a row beyond
    the limit of a line, and without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            size, rows = path.stat().st_size, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=ROWS_PER_READ):
                _check_sizes(batch, path, number)
                for value in batch.to_pylist():
                    number += 1
                    row = Row(place=f"{path}: row {number}", value=value, kind="parquet")
                    yield Found(item=row, size=batch.nbytes // batch.num_rows, position=size * number // rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the Parquet file cannot be read after row {number} ({reason}); write it again."
        ) from error


def _check_sizes(batch: Any, path: Path, before: int) -> None:
    """Raise UserError for a row beyond the limit; ``before`` is the number of rows before the batch."""
    if batch.nbytes <= MAX_RECORD_BYTES:
        return
    for number in range(batch.num_rows):
        if batch.slice(number, 1).nbytes > MAX_RECORD_BYTES:
            raise too_long(f"{path}: row {before + number + 1}", "row")
