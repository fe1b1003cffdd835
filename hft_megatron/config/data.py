"""Options of the data: the records that are read, and the examples that are made of them.

The values of --train-data-path and --valid-data-path are paths, or weights and paths in turn as in Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hft_megatron.config.declared import SAME_RUN, flag
from hft_megatron.config.names import DataFormat
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


LongExamples = Literal["error", "drop", "truncate", "split"]

PackingAlgorithm = Literal["first_fit_decreasing", "first_fit_shuffle"]
"""Under the names that NeMo gives them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data."""

    train_data_path: tuple[str, ...] = ()
    """Training data: files, globs or TRACE task folders (.jsonl, .json, .csv, .tsv, .txt, each also with .gz or .zst,
    .parquet), or the prefix of data from `hft-megatron preprocess`. A number before each is its weight: the share of
    training samples drawn from it, as in Megatron. Without weights every example comes once per epoch. `pretrain` takes
    prefixes of .bin and .idx files for training alone, in place of --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """Validation data, like --train-data-path but without weights (except in `pretrain`); of a TRACE folder, eval.json.
    Several sources are measured one by one and together. A .yaml file lists sources, each with a name and options of
    its own."""
    data_format: DataFormat | None = None
    """Layout of the records; recognised from the keys of a file's first record when unset."""
    data_keys: str | None = None
    """Names for the keys of records, KEY=NAME,...: question=prompt,answer=completion reads `question` as `prompt`."""
    prompt_separator: str = ""
    """Text between a prompt and its completion or answers, where these are separate texts; \\n is a line end."""
    ignore_keys: str | None = None
    """Keys of records and messages to ignore, separated by commas, such as `chosen,name`. They may be keys that would
    otherwise be an error because nothing reads them. The log counts the records that have them."""
    chat_template: str | None = None
    """Chat template: plain, tulu, llama2, llama3, chatml, or a jinja file; the tokenizer's own, or tulu if it has none,
    when unset."""
    loss_on: Literal["assistant", "all", "last"] = "assistant"
    """Tokens that the loss is computed on: the assistant's turns (or the completion), everything, or the assistant's
    last turn."""
    train_on_eos: bool = True
    """Train the token that ends each trained turn. Without it a model does not learn to stop."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Kind of the tokenizer's files; recognised from the files when unset."""
    tokenizer_model: str | None = None
    """Hugging Face folder or SentencePiece .model file; the --load-hf folder when unset."""
    data_cache_path: str | None = None
    """Folder for tokenized data, which the first process writes and the others and later runs read; hft_megatron/data
    in $XDG_CACHE_HOME, or in ~/.cache, when unset. `pretrain` keeps its indices of samples there, and in memory when
    unset."""
    long_examples: LongExamples = "error"
    """Treatment of examples longer than --seq-length: stop with an error, drop them, truncate their end, or split them
    into several examples (each begins where the last one ended, and does not see it). All are counted and reported."""
    packing: Annotated[bool, SAME_RUN] = False
    """Pack several training examples into one sequence of --seq-length (pairs into one of twice that). Attention stays
    within an example and positions restart, so the loss is that of separate examples. Batch sizes, samples and epochs
    then count packs. Validation is not packed: its loss is the same either way."""
    packing_algorithm: Annotated[PackingAlgorithm, SAME_RUN] = "first_fit_decreasing"
    """Order in which examples are packed, each into the first pack with room for it: the longest first
    (first_fit_decreasing), or shuffled (first_fit_shuffle)."""
    packing_window: Annotated[int, Ge(1), SAME_RUN] = 4096
    """Number of shuffled examples that are packed together. More of them fill the packs better and take longer."""


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
    """The mapping of --data-keys. Raises UserError for a part that is no mapping, or a key that is given twice."""
    found: dict[str, str] = {}
    for part in [] if words is None else words.split(","):
        key, equals, known = (word.strip() for word in part.partition("="))
        if not (key and equals and known):
            raise UserError(f"--data-keys {words}: {part!r} is not KEY=NAME; write for example question=prompt.")
        if known not in KNOWN_KEYS:
            turned = f", such as {known}={key}: the record's key comes first" if key in KNOWN_KEYS else ""
            raise UserError(
                f"--data-keys {words}: {known!r} is not a key of any format; choose one of {', '.join(KNOWN_KEYS)}"
                f"{turned}."
            )
        if key in found or known in found.values():
            twice = key if key in found else known
            raise UserError(f"--data-keys {words}: {twice!r} is given twice; map every key once.")
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
                    f"--prompt-separator {words}: a \\ must be followed by n, t or another \\; write \\\\ for a \\."
                )
            text, rest = text + _ESCAPES[rest[0]], rest[1:]
    return text


def ignored_keys(words: str | None) -> tuple[str, ...]:
    """The keys that --ignore-keys names, sorted. Raises UserError for an empty name."""
    keys = [] if words is None else [word.strip() for word in words.split(",")]
    if not all(keys):
        raise UserError(f"--ignore-keys {words!r} has an empty name; write the keys like `id,source`.")
    return tuple(sorted(set(keys)))


def check_record_options(data: DataConfig) -> None:
    """Raise UserError for values of --data-keys and --prompt-separator that have no meaning."""
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
            raise UserError(f"{option}: no path follows the weight {weight:g}; write each weight before its path.")
        if not (math.isfinite(number) and number > 0):
            raise UserError(
                f"{option}: the weight {word} must be above 0; leave out the sources that should not be used."
            )
        weight = number
    if weight is not None:
        raise UserError(f"{option}: no path follows the weight {weight:g}; write ./{weight:g} for a file of that name.")
    unweighted = [source.path for source in sources if source.weight is None]
    if 0 < len(unweighted) < len(sources):
        raise UserError(f"{option}: {unweighted[0]} has no weight, but other paths do; give every path one, or none.")
    return tuple(sources)


def check_sources(data: DataConfig) -> None:
    """Raise UserError where the values of a data option are no mixture, or validation has weights."""
    data_sources("--train-data-path", data.train_data_path)
    for source in data_sources("--valid-data-path", data.valid_data_path):
        if source.weight is not None:
            raise UserError(
                f"--valid-data-path {source.weight:g} {source.path}: validation uses every example exactly once and "
                f"takes no weights; leave {source.weight:g} out."
            )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def training_data_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Training needs text; --train-iters 0 only converts."""
    if config.training.train_iters != 0 and not config.data.train_data_path:
        raise UserError("--train-data-path is missing: give a data file, or --train-iters 0 to train nothing.")


def tokenizer_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every model needs its tokenizer."""
    if config.data.tokenizer_model is None and config.model.load_hf is None:
        raise UserError("--tokenizer-model is missing: a model without --load-hf has no tokenizer of its own; give it.")


def data_sources_are_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Weights stand before paths, for all or none, and not for validation; options about the keys of records are
    valid."""
    check_sources(config.data)
    check_record_options(config.data)


def packing_is_asked_for(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse options about packs without --packing, where they would do nothing."""
    if config.data.packing:
        return
    for field in fields(DataConfig):
        value = getattr(config.data, field.name)
        if field.name.startswith("packing_") and value != field.default:
            raise UserError(f"{flag(field.name)} {value} needs --packing; add it or leave {flag(field.name)} out.")


def validation_has_data(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options of validation come with data to validate on."""
    names = ["eval_interval", "eval_iters", *(["eval_on_start"] if config.logging.eval_tasks is None else [])]
    for name in names:
        value = getattr(config.logging, name)
        if value not in (None, False) and not config.data.valid_data_path:
            given = flag(name) if value is True else f"{flag(name)} {value}"
            needed = "--valid-data-path, or --eval-tasks" if name == "eval_on_start" else "--valid-data-path"
            raise UserError(f"{given} needs {needed}; add it or leave {flag(name)} out.")
