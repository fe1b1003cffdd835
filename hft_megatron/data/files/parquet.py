"""Parquet, read by pyarrow a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hft_megatron.data.files.row import Row
from hft_megatron.data.files.stream import missing_package
from hft_megatron.errors import UserError

ROWS_PER_READ = 256


def read_parquet(path: Path) -> Iterator[Row]:
    """Each row with its number, from 1. Raises UserError for a file that pyarrow can't read, or without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_READ):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(place=f"{path}: row {number}", value=_without_nulls(value))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the Parquet file can't be read after row {number} ({reason}); write it again."
        ) from error


def _without_nulls(value: Any) -> Any:
    """A column that a row lacks is null in Parquet; templates ask whether a key is there."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
