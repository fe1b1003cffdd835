"""The rows of a task's files."""

import json
import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hft_megatron.data.files.rows import BYTE_ORDER_MARK, DataStream, Row, check_text, holds_separator, row_of
from hft_megatron.data.files.sources import DELIMITERS, find_rows, kind_of_file, read_rows
from hft_megatron.data.formats.conversations import kind_of
from hft_megatron.errors import UserError
from hft_megatron.evaluation.tasks import Task

_NO_LINE = "\n"
"""Separator of documents that no line equals, so that a file is one document."""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """A row, and the name of its example."""

    row: Row
    name: str
    """Its place within the task's files, which stays the same where these are moved together."""


def read_task_rows(task: Task) -> list[TaskRow]:
    """The rows of the task, at most ``limit``. Raises UserError for files that cannot be read, and where there are no
    rows."""
    paths = task.paths()
    rows = (row for path in paths for row in _rows_of(path, task))
    name_of = names_of_places(paths)
    found = [TaskRow(row=row, name=name_of(row.place)) for row in islice(rows, task.limit)]
    if not found:
        raise UserError(f"{task.place}: the task {task.name} is empty: there is no row in {_in_words(paths)}.")
    return found


def names_of_places(paths: Sequence[Path]) -> Callable[[str], str]:
    """Names of examples by the places of their rows: without the common folder of the files."""
    above = Path(os.path.commonpath([path.parent.absolute() for path in paths]))
    names = {str(path): str(path.absolute().relative_to(above)) for path in paths}

    def name_of(place: str) -> str:
        # A place is the path, a colon and the rest, searched from its end: a path may begin with another one.
        path = place
        while path not in names:
            path, colon, _ = path.rpartition(":")
            assert colon, "a row is of one of the files"
        return names[path] + place.removeprefix(path)

    return name_of


def read_fewshot_rows(task: Task) -> list[Row]:
    """All rows of the files of its few-shot examples; none where it has no such examples."""
    return [row for path in task.fewshot_paths() for row in _rows_of(path, task)] if task.fewshot else []


def _rows_of(path: Path, task: Task) -> Iterator[Row]:
    kind = kind_of_file(path)
    if task.rows is not None:
        if kind != ".json":
            raise UserError(f"{task.place}: rows {task.rows} is for .json files, but {path} is not one; remove it.")
        return _rows_under(path, task.rows)
    if task.columns:
        if kind not in DELIMITERS:
            raise UserError(f"{task.place}: columns are for .csv and .tsv files, but {path} is not one; remove them.")
        return read_rows(path, task.columns)
    if task.kind == "text" and kind == ".txt":
        return _documents(path, task)
    if task.separator is not None:
        raise UserError(f"{task.place}: separator is for .txt files, but {path} is not one; remove it.")
    return read_rows(path)


def _documents(path: Path, task: Task) -> Iterator[Row]:
    if task.separator is not None and not holds_separator(path, task.separator):
        raise UserError(
            f"{task.place}: no line of {path} is the separator {task.separator!r}; correct it, or remove it if the "
            f"file is one document."
        )
    for found in find_rows(path, task.separator or _NO_LINE):
        yield row_of(found.item)


def _rows_under(path: Path, key: str) -> Iterator[Row]:
    """The list under a key of the one object that the file holds."""
    stream = DataStream(path)
    try:
        blocks = list(iter(lambda: stream.read(1 << 20, place=str(path)), b""))
    finally:
        stream.close()
    try:
        value = json.loads(b"".join(blocks).removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the file is not valid JSON ({error}); with rows {key} it is one object.") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        found = f"the keys {', '.join(value)}" if isinstance(value, dict) else kind_of(value)
        raise UserError(f"{path}: the file must be an object with a list under {key}, but it holds {found}.")
    for number, record in enumerate(value[key], start=1):
        place = f"{path}: record {number}"
        check_text(record, place)
        yield Row(place=place, value=record)


def _in_words(paths: Sequence[Path]) -> str:
    return f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} other files"
