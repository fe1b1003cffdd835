"""Options of the data: which records are read, and what is made of them.

The words of --train-data-path and --valid-data-path are paths, or weights and paths in turn as in Megatron.
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
    """What is trained on."""

    train_data_path: tuple[str, ...] = ()
    """Files, globs or TRACE task folders (.jsonl, .json, .csv, .tsv, .txt, each also with .gz or .zst, .parquet), or
    the prefix of data from `hft-megatron preprocess`. A number before each is its weight: the share of training samples
    drawn from it, as in Megatron. Without weights every example comes once in an epoch. `pretrain` takes prefixes of
    .bin and .idx files for training alone, in place of --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """Like --train-data-path, without weights (but in `pretrain`); of a TRACE folder, eval.json. Several sources have
    values of their own beside those of all. A .yaml file lists sources with a name and options of their own each."""
    data_format: DataFormat | None = None
    """Layout of the records; recognised by the keys of a file's first record when unset."""
    data_keys: str | None = None
    """KEY=NAME,... for records with other names: question=prompt,answer=completion reads `question` as `prompt`."""
    prompt_separator: str = ""
    """Text between a prompt and its completion or answers, where they are texts of their own: \\n is a line end."""
    ignore_keys: str | None = None
    """Keys of records and messages to pass over, separated by commas, such as `chosen,name`: also those that would be
    an error because nothing here reads them. How many records have them is in the log."""
    chat_template: str | None = None
    """plain, tulu, llama2, llama3, chatml, or a jinja file; the tokenizer's own, or tulu where it has none, when
    unset."""
    loss_on: Literal["assistant", "all", "last"] = "assistant"
    """Train the assistant's turns (or the completion), everything, or the last assistant's turn only."""
    train_on_eos: bool = True
    """Train the token that ends each trained turn; without it a model does not learn to stop."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Found from the files when unset."""
    tokenizer_model: str | None = None
    """Hugging Face folder or SentencePiece .model file; the --load-hf folder when unset."""
    data_cache_path: str | None = None
    """Folder in which the first process of a start keeps what it has tokenized, for the others and for later starts;
    hft_megatron/data in $XDG_CACHE_HOME, or in ~/.cache, when unset. Of `pretrain` the indices of samples, which stay
    in memory when unset."""
    long_examples: LongExamples = "error"
    """What to do with an example longer than --seq-length: stop, leave it out, cut off its end, or make several
    examples of it (each begins where the last one ended, and sees nothing of it). All are counted and reported."""
    packing: Annotated[bool, SAME_RUN] = False
    """Put several training examples into one sequence of --seq-length (pairs into one of twice that). Attention stays
    within an example and positions restart, so the loss is that of the examples on their own. Batch sizes, samples and
    epochs then count these packs. Validation is not packed: its loss is the same."""
    packing_algorithm: Annotated[PackingAlgorithm, SAME_RUN] = "first_fit_decreasing"
    """Which examples share a pack: each goes into the first pack with room for it, the longest first, or in shuffled
    order."""
    packing_window: Annotated[int, Ge(1), SAME_RUN] = 4096
    """Examples, of an epoch's shuffled ones, that are packed together; more fill the packs better and take longer."""


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


def ignored_keys(words: str | None) -> tuple[str, ...]:
    """The keys that --ignore-keys names, sorted. Raises UserError for an empty name."""
    keys = [] if words is None else [word.strip() for word in words.split(",")]
    if not all(keys):
        raise UserError(f"--ignore-keys {words!r} has an empty name; write the keys like `id,source`.")
    return tuple(sorted(set(keys)))


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


def training_data_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Training needs text; --train-iters 0 only converts."""
    if config.training.train_iters != 0 and not config.data.train_data_path:
        raise UserError("--train-data-path is missing: give a data file, or --train-iters 0 to train nothing.")


def tokenizer_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every model needs its tokenizer."""
    if config.data.tokenizer_model is None and config.model.load_hf is None:
        raise UserError("--tokenizer-model is missing: a model that is not read by --load-hf brings no tokenizer.")


def data_sources_are_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Weights stand before paths, for all or none; validation, which sees every example once, has none. What is said
    about the keys of records has a meaning."""
    check_sources(config.data)
    check_record_options(config.data)


def packing_is_asked_for(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options about packs do nothing where nothing is packed."""
    if config.data.packing:
        return
    for field in fields(DataConfig):
        value = getattr(config.data, field.name)
        if field.name.startswith("packing_") and value != field.default:
            raise UserError(f"{flag(field.name)} {value} needs --packing; add it or leave {flag(field.name)} out.")


def validation_has_data(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Asking for validation without data to validate on is a forgotten option."""
    names = ["eval_interval", "eval_iters", *(["eval_on_start"] if config.logging.eval_tasks is None else [])]
    for name in names:
        value = getattr(config.logging, name)
        if value not in (None, False) and not config.data.valid_data_path:
            given = flag(name) if value is True else f"{flag(name)} {value}"
            needed = "--valid-data-path, or --eval-tasks" if name == "eval_on_start" else "--valid-data-path"
            raise UserError(f"{given} needs {needed}; add it or leave {flag(name)} out.")
