"""The sources of --valid-data-path: the name of each in the log, its paths, and the options that it is read with.

A word names a source, or a ``.yaml`` file with a list of them, each an entry of its own options.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hft_megatron.config.data import DataConfig, check_record_options, check_sources, data_sources, ignored_keys
from hft_megatron.config.declared import flag
from hft_megatron.config.dpo import check_pair_options
from hft_megatron.config.loading import with_mapping, yaml_of_file
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape

_OPTION = "--valid-data-path"
_NAME, _PATH = "name", "path"
_NULL = "tag:yaml.org,2002:null"
OWN_OPTIONS = (
    "data_format",
    "data_keys",
    "prompt_separator",
    "ignore_keys",
    "chat_template",
    "loss_on",
    "train_on_eos",
    "long_examples",
)
"""Options of the run that an entry may set for itself."""
ENTRY_KEYS = {
    _NAME: "name of its values in the log: `lm loss validation/NAME`",
    _PATH: "a path as on the command line, or a list of paths that are one source; relative to the file",
    **{name: f"in place of `{flag(name)}`" for name in OWN_OPTIONS},
    "chat_template": "in place of `--chat-template`; a template's file is relative to the file, too",
}
"""The keys of an entry and what they mean; the first two must be there."""


@dataclass(frozen=True, kw_only=True)
class ValidSource:
    """One source of validation data."""

    name: str
    paths: tuple[str, ...]
    """Paths as on the command line; several are read one after the other."""
    data: DataConfig
    """The run's options, with the entry's own in their place."""
    place: str = ""
    """File and line of its entry; empty for a word of the command line."""
    own: tuple[str, ...] = ()
    """Names of the options that are the entry's own."""

    @property
    def folder(self) -> Path:
        """Folder that its own chat template is relative to."""
        return Path(self.place).parent if self.place else Path()

    def option(self, key: str) -> str:
        """Name of a key of its entry in errors, or of the option where it has no entry."""
        return f"{self.place}: {key}" if self.place else _OPTION

    @contextmanager
    def told(self) -> Iterator[None]:
        """Adds file and line to errors about options of its entry."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.place}: {error}" if self.place else str(error)) from error


def valid_sources(data: DataConfig) -> tuple[ValidSource, ...]:
    """All sources of --valid-data-path in their order.

    Raises UserError, with file and line, for a file that is not a list of entries, for an entry that is not valid, and
    for a source that is given twice.
    """
    sources: list[ValidSource] = []
    for word in data_sources(_OPTION, data.valid_data_path):
        if Path(word.path).suffix.lower() in (".yaml", ".yml"):
            sources += _sources_of_file(Path(word.path), data)
        else:
            sources.append(ValidSource(name="", paths=(word.path,), data=data))
    given = [source.name for source in sources if source.name]
    for source in sources:
        if given.count(source.name) > 1:
            raise UserError(
                f"{source.place}: another source has the name {source.name} as well; give every source its own name."
            )
    words = iter(_names([source.paths[0] for source in sources if not source.name], given))
    return tuple(source if source.name else replace(source, name=next(words)) for source in sources)


def _sources_of_file(file: Path, data: DataConfig) -> Iterator[ValidSource]:
    root = yaml_of_file(file, _OPTION)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(
            f"{_OPTION} {file}: the file must hold a list of sources, each `- name: ...` with its `path: ...`."
        )
    for node in root.value:
        yield _source_of_entry(node, file, data)


def _source_of_entry(node: yaml.Node, file: Path, data: DataConfig) -> ValidSource:
    place = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place}: a source must be `- name: ...` with its `path: ...`.")
    values = dict[str, yaml.Node]()
    for key, value in node.value:
        where, name = f"{file}:{key.start_mark.line + 1}: {key.value}", str(key.value).replace("-", "_")
        if name not in ENTRY_KEYS:
            raise UserError(f"{where} is not a key of a source; choose from {', '.join(ENTRY_KEYS)}.")
        if name in values:
            raise UserError(f"{where} is set twice in one source; leave one of them out.")
        values[name] = value
    names = _words(values, _NAME, place)
    if len(names) != 1 or not names[0].isprintable() or names[0] != names[0].strip():
        raise UserError(f"{place}: the name of a source must be one line of text, such as `name: general`.")
    paths = _words(values, _PATH, place)
    own = [(key, value) for key, value in node.value if key.value not in (_NAME, _PATH)]
    options = with_mapping(RunConfig(data=data), yaml.MappingNode(node.tag, own), file).data
    return ValidSource(
        name=names[0],
        paths=tuple(os.path.join(file.parent, path) for path in paths),
        data=options,
        place=place,
        own=tuple(name for name in OWN_OPTIONS if name in values and values[name].tag != _NULL),
    )


def _words(values: dict[str, yaml.Node], key: str, place: str) -> list[str]:
    node = values.get(key)
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    words = [one.value for one in nodes if isinstance(one, yaml.ScalarNode) and one.tag != _NULL]
    if not words or len(words) < len(nodes) or "" in words:
        needed = "text, or a list of texts" if key == _PATH else "text"
        raise UserError(f"{place}: the source has no {key}; add `{key}: ...`, which is {needed}.")
    return words


_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


def _names(paths: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The shortest unique name of each path among its ``_candidates``. Raises UserError where two paths are equal."""
    candidates = [_candidates(path) for path in paths]
    owners = Counter(name for one in candidates for name in set(one))
    names = []
    for path, own in zip(paths, candidates, strict=True):
        name = next((name for name in own if owners[name] == 1 and name not in taken), None)
        if name is None:
            raise UserError(
                f"{_OPTION} {path} is given twice, but validation uses every example once; leave one of them out."
            )
        names.append(name)
    return names


def _candidates(path: str) -> list[str]:
    """The file's stem, then with more and more of the folders before it, then the same with its suffix."""
    *folders, last = Path(os.path.abspath(path)).parts
    stem = last
    if not Path(path).is_dir():
        stem = stem.removesuffix(".gz").removesuffix(".zst")
        stem = Path(stem).stem if Path(stem).suffix.lower() in _SUFFIXES else stem
    found = []
    for name in dict.fromkeys((stem, last)):
        for size in range(len(folders) + 1):
            parts = [*folders[len(folders) - size :], name]
            # `*` alone tells nobody what it is of.
            if parts[0].strip("*?") or size == len(folders):
                found.append(str(Path(*parts)))
    return found


def validation_sources_are_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Sources have unique names, and entries of a file have valid options."""
    check_valid_sources(config.data)


def sources_hold_pairs(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse options of single examples in the entries of a file for pairs."""
    check_pair_sources(config.data)


def check_pair_sources(data: DataConfig) -> None:
    """Raise UserError for an option of single examples, of the run or of an entry, which does not apply to pairs."""
    check_pair_options(data)
    for source in valid_sources(data):
        with source.told():
            check_pair_options(source.data)


def check_valid_sources(data: DataConfig) -> None:
    """Raise UserError for the first mistake in --valid-data-path, before a data file is read."""
    check_sources(data)
    for source in valid_sources(data):
        with source.told():
            check_record_options(source.data)
            if "ignore_keys" in source.own:
                ignored_keys(source.data.ignore_keys)
