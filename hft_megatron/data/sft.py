"""Reads and tokenizes the sources of supervised fine-tuning."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hft_megatron.config.names import DataFormat
from hft_megatron.data.dataset import ExamplesInMemory, ExampleStore, SftDataset, SourcePart, places_in
from hft_megatron.data.examples import ExampleRules, SftCounts, read_source
from hft_megatron.data.faults import Faults, RecordUse
from hft_megatron.data.files.sources import SourceFiles, file_digest
from hft_megatron.data.preprocessed.opening import open_preprocessed
from hft_megatron.data.token_cache import NO_CACHE, TokenCache, Tokenized, named
from hft_megatron.data.tokenizer import Encoded, Tokenizer
from hft_megatron.errors import UserError

_READING = 2
"""To be raised when the same files, tokenizer and rules become other examples: runs of before are of other data."""


def load_sft_dataset(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, cache: TokenCache = NO_CACHE
) -> SftDataset:
    """Read and tokenize all sources, or map what another process has put into ``cache``.

    Needs no model and no process group. Raises UserError with every kind of fault that records have (malformed, not to
    be rendered, nothing to learn, too long under ``error``) and the places of two, and for a source without examples
    or with too small a weight.
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
"""The examples of a source, their account, and what they were made of."""


def _read_sources(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, cache: TokenCache
) -> tuple[list[_Loaded], str]:
    """All sources, and where they are mapped from, for the log."""
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
    faults, kept, places = Faults(), list[Encoded](), list[str]()
    accounts = []
    for source in sources:
        examples, of_source, account = read_source(source, tokenizer, rules, faults)
        kept += examples
        places += places_in(source.files, of_source)
        accounts.append({"examples": len(examples), **account})
    faults.raise_if_any()
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


def data_digest(origins: Sequence[dict[str, Any]], tokenizer: Tokenizer, rules: ExampleRules, *others: str) -> str:
    """sha256 (hex) over all that decides the examples: what each source was made of, the tokenizer, the rules, and
    ``others`` that not every method has."""
    identity, decided = asked_of(tokenizer, rules)
    decisive = {"reading": _READING, "sources": origins, "tokenizer": identity, "rules": [decided, *others]}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def asked_of(tokenizer: Tokenizer, rules: ExampleRules) -> tuple[list[Any], dict[str, Any]]:
    """What decides the examples that files become: the tokenizer with its template, and the rules. As JSON has it."""
    facts = tokenizer.facts
    return [facts.identity, facts.chat_template, dict(facts.template_variables)], asdict(rules)
