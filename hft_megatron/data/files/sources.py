"""The files that a data path means: itself, those that a glob matches, one split of a TRACE task's folder, or those of
preprocessed data.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.data_sources import data_sources
from hft_megatron.data.files.prefixes import is_prefix
from hft_megatron.errors import UserError

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
