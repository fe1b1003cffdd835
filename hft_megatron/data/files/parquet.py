"""Parquet, read by pyarrow a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hft_megatron.data.files.row import Found, Row
from hft_megatron.data.files.stream import MAX_RECORD_BYTES, missing_package, too_long
from hft_megatron.errors import UserError

ROWS_PER_READ = 256


def find_in_parquet(path: Path) -> Iterator[Found]:
    """Each row with its number, from 1. Raises UserError for a file that pyarrow can't read, for a row
    as long as no line may be, and without pyarrow."""
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
            f"{path}: the Parquet file can't be read after row {number} ({reason}); write it again."
        ) from error


def _check_sizes(batch: Any, path: Path, before: int) -> None:
    """Raise UserError for a row beyond the limit; ``before`` is the number of rows in front of the batch."""
    if batch.nbytes <= MAX_RECORD_BYTES:
        return
    for number in range(batch.num_rows):
        if batch.slice(number, 1).nbytes > MAX_RECORD_BYTES:
            raise too_long(f"{path}: row {before + number + 1}", "row")
