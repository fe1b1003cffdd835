"""The files of a data source and their rows, by the kind of each file."""

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.data import data_sources
from hft_megatron.data.files.json_rows import find_in_array_or_lines, find_lines, text_of_line, value_of
from hft_megatron.data.files.row import MAX_RECORD_BYTES, DataStream, Found, Line, Row, is_prefix
from hft_megatron.data.files.tables import find_in_delimited, find_in_parquet
from hft_megatron.errors import UserError


def find_documents(path: Path, separator: str | None) -> Iterator[Found]:
    """Each document that isn't blank, with the place of its first line.

    With a ``separator`` a document ends at a line that holds nothing else. Raises UserError naming file and line.
    """
    stream = DataStream(path)
    end = None if separator is None else separator.encode()
    try:
        first, size = 1, 0
        parts: list[bytes] = []
        for number, raw in stream.lines():
            if number == 1:
                _refuse_json(raw, path)
            ends = end is None or raw.strip() == end
            # Of a document that is too long only so much is kept that its reader sees it is.
            if not (ends and end is not None) and size <= MAX_RECORD_BYTES:
                parts.append(raw)
            size += len(raw)
            if ends:
                yield from _document(path, first, parts, size, stream.position)
                first, parts, size = number + 1, [], 0
        yield from _document(path, first, parts, size, stream.position)
    finally:
        stream.close()


def holds_separator(path: Path, separator: str) -> bool:
    """Whether a line of the file holds nothing else. Raises UserError naming file and line."""
    stream, end = DataStream(path), separator.encode()
    try:
        return any(raw.strip() == end for _, raw in stream.lines())
    finally:
        stream.close()


def _document(path: Path, line: int, parts: list[bytes], size: int, position: int) -> Iterator[Found]:
    raw = b"".join(parts)[: MAX_RECORD_BYTES + 1]
    if raw.strip():
        yield Found(item=Line(place=f"{path}:{line}", raw=raw, plain=True), size=size, position=position)


def _refuse_json(raw: bytes, path: Path) -> None:
    """JSON Lines under the wrong name would be trained as they stand, braces and all."""
    try:
        is_record = raw.lstrip().startswith(b"{") and isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return
    if is_record:
        raise UserError(f"{path}:1: the line is a JSON object, but a .txt file is plain text; name the file .jsonl.")


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


TRAIN_SPLIT, VALID_SPLIT = "train.json", "eval.json"
"""Files of a TRACE task's folder; its test.json is for scoring."""


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """One source of a mixture."""

    path: str
    """As written."""
    weight: float | None
    files: tuple[Path, ...]
    """At least one, of a glob in the order of their names; none of preprocessed data."""
    prefix: str | None = None
    """What the names of preprocessed data begin with."""


def find_sources(option: str, words: Sequence[str], split: str) -> tuple[SourceFiles, ...]:
    """The sources that the words of --train-data-path or --valid-data-path name, with their files.

    ``split`` is the file that is meant by a TRACE task's folder. Raises UserError where a source has no file.
    """
    sources = []
    for source in data_sources(option, words):
        is_prepared = not Path(source.path).is_file() and is_prefix(source.path)
        sources.append(
            SourceFiles(
                path=source.path,
                weight=source.weight,
                files=() if is_prepared else _find_files(source.path, option, split),
                prefix=source.path if is_prepared else None,
            )
        )
    return tuple(sources)


def find_input(option: str, words: Sequence[str], split: str) -> tuple[Path, ...]:
    """The files of all ``words`` in order. Raises UserError where one has a weight, or is preprocessed already."""
    sources = find_sources(option, words, split)
    for source in sources:
        if source.weight is not None:
            raise UserError(
                f"{option} {source.weight:g} {source.path}: weights are of training, which takes them before the "
                f"prefix; leave {source.weight:g} out."
            )
        if source.prefix is not None:
            raise UserError(f"{option} {source.path} is preprocessed already; name the files that it was made of.")
    return tuple(file for source in sources for file in source.files)


def _find_files(path: str, option: str, split: str) -> tuple[Path, ...]:
    place = Path(path)
    if place.is_dir():
        return (_split_of_folder(place, option, split),)
    if place.exists():
        if place.suffix in (".bin", ".idx"):
            raise UserError(f"{option} {path} is a part of preprocessed data; name them without {place.suffix}.")
        return (_regular(place, option),)
    if not glob.has_magic(path):
        raise UserError(f"{option} {path}: there is no such file.")
    files = sorted(found for found in glob.glob(path, recursive=True) if not Path(found).is_dir())
    if not files:
        raise UserError(f"{option} {path} matches no file.")
    return tuple(_regular(Path(file), option) for file in files)


def _regular(place: Path, option: str) -> Path:
    """``place``, if it isn't a pipe or a device: every rank reads the data, and once more for their digest."""
    if place.exists() and not place.is_file():
        raise UserError(f"{option} {place} is a pipe or a device, which can't be read twice; write a file of it.")
    return place


def _split_of_folder(folder: Path, option: str, split: str) -> Path:
    if (folder / split).is_file():
        return folder / split
    tasks = sorted(inner.parent.name for inner in folder.glob(f"*/{split}"))
    if tasks:
        raise UserError(
            f"{option} {folder} is a folder of the TRACE tasks {', '.join(tasks)}; name one of them, or all with "
            f"'{folder}/*/{split}'."
        )
    raise UserError(
        f"{option} {folder} is a folder without {split}, so it is no TRACE task; name a file, or files with a glob "
        f"such as '{folder}/*.jsonl'."
    )
