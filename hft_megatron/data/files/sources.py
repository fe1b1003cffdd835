"""The files that a data source names, and their rows by the kind of each file."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.data import DataSource, data_sources
from hft_megatron.config.valid_sources import ValidSource
from hft_megatron.data.files.json_array import find_in_array_or_lines
from hft_megatron.data.files.rows import Found, Row, find_documents, find_lines, row_of
from hft_megatron.data.files.tables import find_in_delimited, find_in_parquet
from hft_megatron.errors import UserError

TRAIN_SPLIT, VALID_SPLIT = "train.json", "eval.json"
"""Files of a TRACE task's folder; its test.json is for scoring."""


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """One source of a mixture."""

    path: str
    """Path as written; for several paths that are one source, its name."""
    weight: float | None
    files: tuple[Path, ...]
    """Files, at least one, of a glob in the order of their names; none for preprocessed data."""
    prefix: str | None = None
    """Prefix of the names of preprocessed data."""


def find_sources(option: str, words: Sequence[str], split: str) -> tuple[SourceFiles, ...]:
    """The sources that --train-data-path or --valid-data-path names, with their files.

    ``split`` is the file to take from a TRACE task's folder. Raises UserError where a source has no file.
    """
    return tuple(_find_source(source, option, split) for source in data_sources(option, words))


def _find_source(source: DataSource, option: str, split: str) -> SourceFiles:
    is_prepared = not Path(source.path).is_file() and is_prefix(source.path)
    return SourceFiles(
        path=source.path,
        weight=source.weight,
        files=() if is_prepared else _find_files(source.path, option, split),
        prefix=source.path if is_prepared else None,
    )


def find_valid_source(source: ValidSource) -> SourceFiles:
    """The files of one source of --valid-data-path, of all its paths in order. Raises UserError where a path has no
    file, and for preprocessed data beside other paths."""
    option = source.option("path")
    found = [_find_source(DataSource(path=path, weight=None), option, VALID_SPLIT) for path in source.paths]
    if len(found) == 1:
        return found[0]
    for one in found:
        if one.prefix is not None:
            raise UserError(f"{option} {one.path} is preprocessed and must be a source alone; give it its own entry.")
    return SourceFiles(path=source.name, weight=None, files=tuple(file for one in found for file in one.files))


def find_input(option: str, words: Sequence[str], split: str) -> tuple[Path, ...]:
    """The files of all ``words`` in order. Raises UserError where one has a weight, or is already preprocessed."""
    sources = find_sources(option, words, split)
    for source in sources:
        if source.weight is not None:
            raise UserError(
                f"{option} {source.weight:g} {source.path}: weights belong to training, which takes them before the "
                f"prefix; leave {source.weight:g} out."
            )
        if source.prefix is not None:
            raise UserError(f"{option} {source.path} is already preprocessed; name the files that it was made from.")
    return tuple(file for source in sources for file in source.files)


def _find_files(path: str, option: str, split: str) -> tuple[Path, ...]:
    place = Path(path)
    if place.is_dir():
        return (_split_of_folder(place, option, split),)
    if place.exists():
        if place.suffix in (".bin", ".idx"):
            raise UserError(f"{option} {path} is a part of preprocessed data; leave out {place.suffix}.")
        return (_regular(place, option),)
    if not glob.has_magic(path):
        raise UserError(f"{option} {path}: there is no such file.")
    files = sorted(found for found in glob.glob(path, recursive=True) if not Path(found).is_dir())
    if not files:
        raise UserError(f"{option} {path} matches no file.")
    return tuple(_regular(Path(file), option) for file in files)


def _regular(place: Path, option: str) -> Path:
    """``place``, if it isn't a pipe or a device: every rank reads the data, and once more for the digest."""
    if place.exists() and not place.is_file():
        raise UserError(f"{option} {place} is a pipe or a device, which cannot be read twice; write it to a file.")
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
        f"{option} {folder} is a folder without {split}, so it is not a TRACE task; name a file, or files with a glob "
        f"such as '{folder}/*.jsonl'."
    )


FACTS, LOSS_MASK, BOUNDARIES = "_preprocessed.json", "_loss_mask", "_boundaries"
"""The companions of PREFIX.bin and PREFIX.idx; the last two are .bin and .idx as well."""
UNFINISHED, BAD_LINES = "_unfinished", "_bad_lines.jsonl"
"""The folder of incomplete data, and the records that were skipped."""


def is_prefix(path: str) -> bool:
    """True if the path is the prefix of preprocessed data, complete or not."""
    return any(Path(f"{path}{end}").exists() for end in (".idx", ".bin", FACTS, UNFINISHED))


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file in its order: Parquet, a JSON array (``.json``), ``.csv``, ``.tsv``, text (``.txt``), or JSON
    Lines under any other name.

    ``.gz`` and ``.zst`` after the name are decompressed. ``columns`` names the columns of a ``.csv`` or ``.tsv`` file
    without a header line. Raises UserError naming the place for a file that cannot be opened or read, or that isn't
    what its name says.
    """
    kind = kind_of_file(path)
    rows = find_in_delimited(path, DELIMITERS[kind], columns) if columns else find_rows(path)
    for found in rows:
        yield row_of(found.item)


def find_rows(path: Path, separator: str | None = None) -> Iterator[Found]:
    """The rows of ``read_rows``, lines not parsed yet; ``separator`` is the line between the documents of a text."""
    kind = kind_of_file(path)
    if kind == ".parquet":
        return find_in_parquet(path)
    if kind in DELIMITERS:
        return find_in_delimited(path, DELIMITERS[kind])
    if kind == ".txt":
        return find_documents(path, separator)
    return find_in_array_or_lines(path) if kind == ".json" else find_lines(path)


DELIMITERS = {".csv": ",", ".tsv": "\t"}


def kind_of_file(path: Path) -> str:
    """The suffix that decides how the file is read, in lower case and without that of the compression."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
