"""Loads the data sets that a run's data options name: tokenizes them, or maps an earlier start's cache."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from hft_megatron.config.data import DataConfig, data_keys, ignored_keys, prompt_separator
from hft_megatron.config.dpo import BadPairs
from hft_megatron.config.file_digest import file_digest
from hft_megatron.config.names import DataFormat
from hft_megatron.config.valid_sources import ValidSource, valid_sources
from hft_megatron.data.chat import LossRule
from hft_megatron.data.dataset import (
    ExamplesInMemory,
    ExampleStore,
    SftDataset,
    SourcePart,
    asked_of,
    data_digest,
    places_in,
)
from hft_megatron.data.examples import ExampleRules, SftCounts, read_source
from hft_megatron.data.files.sources import TRAIN_SPLIT, SourceFiles, find_sources, find_valid_source
from hft_megatron.data.pairs import PairDataset, load_pair_dataset
from hft_megatron.data.preprocessed.opening import open_preprocessed
from hft_megatron.data.record_errors import RecordErrors, RecordUse, check_use
from hft_megatron.data.records import RecordRules
from hft_megatron.data.templates import BUILT_IN, read_template
from hft_megatron.data.token_cache import NO_CACHE, TokenCache, Tokenized, named, open_token_cache
from hft_megatron.data.tokenizer import Encoded, Tokenizer
from hft_megatron.errors import UserError


def training_data(data: DataConfig, tokenizer: Tokenizer, seq_length: int) -> SftDataset | None:
    """The data of --train-data-path, None where it is unset; ``seq_length`` is in positions.

    Raises UserError for a source without files and for an error in them.
    """
    return _load_train(data, seq_length, _load_examples(tokenizer))


def validation_data(data: DataConfig, tokenizer: Tokenizer, seq_length: int) -> dict[str, SftDataset]:
    """The data of --valid-data-path, by the names of its sources; each is read by the rules of the training data, or by
    its own."""
    return _load_valid(data, seq_length, tokenizer, _load_examples)


def training_pairs(data: DataConfig, tokenizer: Tokenizer, seq_length: int, bad_pairs: BadPairs) -> PairDataset | None:
    """The preference pairs of --train-data-path, None where it is unset."""
    return _load_train(data, seq_length, _load_pairs(tokenizer, bad_pairs))


def validation_pairs(
    data: DataConfig, tokenizer: Tokenizer, seq_length: int, bad_pairs: BadPairs
) -> dict[str, PairDataset]:
    """The preference pairs of --valid-data-path, by the names of its sources."""
    return _load_valid(data, seq_length, tokenizer, lambda tokenizer: _load_pairs(tokenizer, bad_pairs))


DatasetT = TypeVar("DatasetT", SftDataset, PairDataset)
_Loader = Callable[[Sequence[SourceFiles], ExampleRules, TokenCache], DatasetT]


def _load_examples(tokenizer: Tokenizer) -> _Loader[SftDataset]:
    return lambda sources, rules, cache: load_sft_dataset(sources, tokenizer, rules, cache)


def _load_pairs(tokenizer: Tokenizer, bad_pairs: BadPairs) -> _Loader[PairDataset]:
    return lambda sources, rules, cache: load_pair_dataset(sources, tokenizer, rules, bad_pairs, cache)


def _load_train(data: DataConfig, seq_length: int, load: _Loader[DatasetT]) -> DatasetT | None:
    option = "--train-data-path"
    sources = find_sources(option, data.train_data_path, TRAIN_SPLIT)
    if not sources:
        return None
    dataset = load(sources, _rules(data, seq_length), open_token_cache(data.data_cache_path))
    check_use(data_keys(data.data_keys), prompt_separator(data.prompt_separator), dataset.uses, option)
    return dataset


def _load_valid(
    data: DataConfig, seq_length: int, tokenizer: Tokenizer, loader: Callable[[Tokenizer], _Loader[DatasetT]]
) -> dict[str, DatasetT]:
    cache = open_token_cache(data.data_cache_path)
    sources, found, uses = valid_sources(data), dict[str, DatasetT](), list[RecordUse]()
    for source in sources:
        files, load = find_valid_source(source), loader(_tokenizer_of(source, tokenizer))
        found[source.name] = load([files], _rules(source.data, seq_length), cache)
        uses += found[source.name].uses
        # Keys that an entry asks for must be in its data; those of the run may be missing from validation data.
        with source.told():
            keys = data_keys(source.data.data_keys) if "data_keys" in source.own else ()
            separator = source.data.prompt_separator if "prompt_separator" in source.own else ""
            check_use(keys, prompt_separator(separator), found[source.name].uses, source.name)
    if sources and not data.train_data_path:
        check_use(data_keys(data.data_keys), prompt_separator(data.prompt_separator), uses, "--valid-data-path")
    return found


def _tokenizer_of(source: ValidSource, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the source's own chat template, where it has one."""
    choice = source.data.chat_template
    if "chat_template" not in source.own or choice is None:
        return tokenizer
    with source.told():
        file = choice if choice in BUILT_IN else str(source.folder / choice)
        return tokenizer.with_facts(chat_template=read_template(file, tokenizer.facts.special_tokens))


def _rules(data: DataConfig, seq_length: int) -> ExampleRules:
    return ExampleRules(
        seq_length=seq_length,
        long_examples=data.long_examples,
        loss=LossRule(loss_on=data.loss_on, train_on_eos=data.train_on_eos),
        records=record_rules(data),
    )


def load_sft_dataset(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, cache: TokenCache = NO_CACHE
) -> SftDataset:
    """Read and tokenize all sources, or map another process's result from ``cache``.

    Needs no model and no process group. Raises UserError with every kind of error in records (malformed, refused by the
    template, nothing to learn, too long under ``error``) and the places of two, and for a source without examples or
    with too small a weight.
    """
    found, note = _read_sources([each for each in sources if each.prefix is None], tokenizer, rules, cache)
    read = iter(found)
    loaded = [
        next(read) if source.prefix is None else _open_source(source, source.prefix, tokenizer, rules)
        for source in sources
    ]
    parts = tuple(part for _, part, _ in loaded)
    dataset = SftDataset(
        parts=parts,
        stores=tuple(store for store, _, _ in loaded),
        seq_length=rules.seq_length,
        digest=data_digest([origin for _, _, origin in loaded], tokenizer, rules),
        note=note,
    )
    for part, share in zip(parts, dataset.mix.shares or (1,) * len(parts), strict=True):
        if share == 0:
            raise UserError(
                f"the weight {part.weight:g} of {part.path} gives it no sample in an epoch of {len(dataset)}; raise "
                f"it, or leave the source out."
            )
    return dataset


_Loaded = tuple[ExampleStore, SourcePart, dict[str, Any]]
"""The examples of a source, their account, and their origin."""


def _read_sources(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, cache: TokenCache
) -> tuple[list[_Loaded], str]:
    """All sources, and the folder that they are mapped from, for the log."""
    if not sources:
        return [], ""
    digests = [[file_digest(file) for file in source.files] for source in sources]
    decisive = ["sft", [named(*each) for each in zip(sources, digests, strict=True)], *asked_of(tokenizer, rules)]
    found = cache.tokenized(decisive, lambda: _tokenize(sources, tokenizer, rules))
    loaded: list[_Loaded] = []
    first = 0
    for source, files, account in zip(sources, digests, found.account["sources"], strict=True):
        part = _part(
            source,
            tuple(account["formats"]),
            account["examples"],
            SftCounts.from_dict(account["counts"]),
            RecordUse.from_dict(account["use"]),
        )
        origin = {"weight": source.weight, "files": files}
        loaded.append((found.store.part(first, part.examples), part, origin))
        first += part.examples
    return loaded, found.note


def _tokenize(sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules) -> Tokenized:
    errors, kept, places = RecordErrors(), list[Encoded](), list[str]()
    accounts = []
    for source in sources:
        examples, of_source, account = read_source(source, tokenizer, rules, errors)
        kept += examples
        places += places_in(source.files, of_source)
        accounts.append({"examples": len(examples), **account})
    errors.raise_if_any()
    return Tokenized(store=ExamplesInMemory.of(kept, places), account={"sources": accounts})


def _open_source(source: SourceFiles, prefix: str, tokenizer: Tokenizer, rules: ExampleRules) -> _Loaded:
    store, facts = open_preprocessed(prefix, tokenizer, rules)
    facts.counts.check_learnable(facts.examples, source.path, rules)
    part = _part(source, facts.formats, facts.examples, facts.counts, facts.use)
    return store, part, {"weight": source.weight, **facts.origin}


def _part(
    source: SourceFiles, formats: tuple[DataFormat, ...], examples: int, counts: SftCounts, use: RecordUse
) -> SourcePart:
    return SourcePart(
        path=source.path,
        weight=source.weight,
        formats=formats,
        files=tuple(map(str, source.files)),
        examples=examples,
        counts=counts,
        use=use,
    )


class RecordOptions(Protocol):
    """The options that decide the meaning of a row."""

    @property
    def data_format(self) -> DataFormat | None: ...
    @property
    def data_keys(self) -> str | None: ...
    @property
    def prompt_separator(self) -> str: ...
    @property
    def ignore_keys(self) -> str | None: ...


def record_rules(options: RecordOptions) -> RecordRules:
    """The rules of the options. Raises UserError for an unknown value."""
    return RecordRules(
        data_format=options.data_format,
        data_keys=data_keys(options.data_keys),
        prompt_separator=prompt_separator(options.prompt_separator),
        ignore_keys=ignored_keys(options.ignore_keys),
    )
