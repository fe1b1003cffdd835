"""A data file as rows, whatever it is written in."""

from collections.abc import Iterator
from pathlib import Path

from hft_megatron.data.files.json_array import read_array_or_lines
from hft_megatron.data.files.json_lines import read_lines
from hft_megatron.data.files.parquet import read_parquet
from hft_megatron.data.files.row import Row


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in its order: Parquet, a JSON array (``.json``), or JSON Lines under any other name.

    ``.gz`` and ``.zst`` behind the name are decompressed. Raises UserError naming the place for a file that can't be
    opened or read, or isn't what its name says.
    """
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return read_parquet(path)
    return read_array_or_lines(path) if name.endswith(".json") else read_lines(path)
