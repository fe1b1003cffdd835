"""The words of --train-data-path and --valid-data-path: paths, or weights and paths in turn as in Megatron."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hft_megatron.config.schema import DataConfig
from hft_megatron.errors import UserError

KNOWN_KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "answer",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "text",
)
"""The keys of a record that some format reads."""
DataKeys = tuple[tuple[str, str], ...]
"""(key of the records, key that the formats know), in the order of the first."""
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def data_keys(words: str | None) -> DataKeys:
    """What --data-keys maps. Raises UserError for a part that is no mapping, or a key that is there twice."""
    found: dict[str, str] = {}
    for part in [] if words is None else words.split(","):
        key, equals, known = (word.strip() for word in part.partition("="))
        if not (key and equals and known):
            raise UserError(f"--data-keys {words}: {part!r} is not KEY=NAME; write for example question=prompt.")
        if known not in KNOWN_KEYS:
            turned = f", such as {known}={key}: the record's key comes first" if key in KNOWN_KEYS else ""
            raise UserError(
                f"--data-keys {words}: {known!r} is no key that a format has; choose one of {', '.join(KNOWN_KEYS)}"
                f"{turned}."
            )
        if key in found or known in found.values():
            twice = key if key in found else known
            raise UserError(f"--data-keys {words}: {twice!r} is there twice; every key means one thing.")
        found[key] = known
    return tuple(sorted(found.items()))


def prompt_separator(words: str) -> str:
    r"""The text that --prompt-separator means: ``\n``, ``\t`` and ``\\`` are a line end, a tab and a backslash."""
    text, rest = "", words
    while rest:
        before, slash, rest = rest.partition("\\")
        text += before
        if slash:
            if rest[:1] not in _ESCAPES:
                raise UserError(
                    f"--prompt-separator {words}: a \\ stands before n, t or another \\; write \\\\ for one."
                )
            text, rest = text + _ESCAPES[rest[0]], rest[1:]
    return text


def check_record_options(data: DataConfig) -> None:
    """Raise UserError for words that mean nothing."""
    data_keys(data.data_keys)
    prompt_separator(data.prompt_separator)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One entry of a mixture."""

    path: str
    """A file, a glob or a TRACE task's folder, as written."""
    weight: float | None
    """Share of the samples, in proportion to the other sources' weights; None where no source has a weight."""


def data_sources(option: str, words: Sequence[str]) -> tuple[DataSource, ...]:
    """The sources that ``words`` name; a word that reads as a number is the weight of the path behind it.

    Raises UserError, with ``option`` in it, for a weight that isn't positive or has no path, and where only some of
    the paths have one.
    """
    sources: list[DataSource] = []
    weight: float | None = None
    for word in words:
        number = _number(word)
        if number is None:
            sources.append(DataSource(path=word, weight=weight))
            weight = None
            continue
        if weight is not None:
            raise UserError(f"{option}: the weight {weight:g} has no path behind it; write a weight before every path.")
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{option}: the weight {word} must be a number above 0; leave out what has no weight.")
        weight = number
    if weight is not None:
        raise UserError(
            f"{option}: the weight {weight:g} has no path behind it; write ./{weight:g} for a file of that name."
        )
    unweighted = [source.path for source in sources if source.weight is None]
    if 0 < len(unweighted) < len(sources):
        raise UserError(f"{option}: {unweighted[0]} has no weight, but other paths do; give all of them one, or none.")
    return tuple(sources)


def ignored_keys(words: str | None) -> tuple[str, ...]:
    """The keys that --ignore-keys names, sorted. Raises UserError for an empty name."""
    keys = [] if words is None else [word.strip() for word in words.split(",")]
    if not all(keys):
        raise UserError(f"--ignore-keys {words!r} has an empty name; write the keys like `id,source`.")
    return tuple(sorted(set(keys)))


def check_sources(data: DataConfig) -> None:
    """Raise UserError where the words of a data option name no mixture, or validation has weights."""
    data_sources("--train-data-path", data.train_data_path)
    for source in data_sources("--valid-data-path", data.valid_data_path):
        if source.weight is not None:
            raise UserError(
                f"--valid-data-path {source.weight:g} {source.path}: validation sees every example exactly once and "
                f"takes no weights; leave {source.weight:g} out."
            )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
