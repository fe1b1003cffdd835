"""The examples of supervised fine-tuning: token ids and which of them are trained, for all sources of a run.

The model sees ``tokens[:-1]`` of an example and predicts ``tokens[1:]``, so an example of L tokens has L-1 positions,
and that number is what the sequence length limits.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.names import DataFormat
from hft_megatron.data.examples import read_examples
from hft_megatron.data.faults import Faults, RecordRefused, RecordUse
from hft_megatron.data.files.sources import SourceFiles, file_digest
from hft_megatron.data.fitting import NO_LIMIT, ExampleRules, SftCounts, check_predicts, spans_of
from hft_megatron.data.order import Order, SourceMix
from hft_megatron.data.preprocessed.opening import open_preprocessed
from hft_megatron.data.records import RecordReader
from hft_megatron.data.stores import (
    Encoded,
    ExamplesInMemory,
    ExampleStore,
    NamedSource,
    TokenCache,
    Tokenized,
    named,
    named_members,
    places_in,
    tokenized,
)
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError

_READING = 2
"""To be raised when the same files, tokenizer and rules become other examples: runs of before are of other data."""


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """The examples of one source: a range of the data set's."""

    path: str
    weight: float | None
    formats: tuple[DataFormat, ...]
    """Those of its files."""
    files: tuple[str, ...]
    """None of preprocessed data."""
    examples: int
    counts: SftCounts
    use: RecordUse

    def summary(self) -> str:
        """One line for the log, with everything that was shortened or left out."""
        counts = self.counts
        lost = f" with {counts.lost_tokens} tokens lost" if counts.lost_tokens else ""
        split = f", {counts.split} split" if counts.split else ""
        return (
            f"{self.path} ({', '.join(self.formats)}{self.use.words()}): {self.examples} examples of {counts.read} "
            f"records, {counts.trained_tokens} trained tokens of {counts.tokens}, {counts.truncated} truncated and "
            f"{counts.dropped} dropped{lost}{split}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SftDataset:
    """All examples, source after source."""

    parts: tuple[SourcePart, ...]
    stores: tuple[ExampleStore, ...]
    """The examples of each part."""
    seq_length: int
    digest: str
    """sha256 over files, weights, template, tokenizer and rules: equal digests mean equal examples in equal order."""
    note: str = ""
    """A line about where the tokens are mapped from."""

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, shape (examples,)."""
        return np.concatenate([store.lengths for store in self.stores])

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((len(store.lengths) for store in self.stores), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def uses_chat_template(self) -> bool:
        """Whether the chat template has rendered any of it."""
        return any(part.counts.conversations > 0 for part in self.parts)

    def example(self, index: int) -> Encoded:
        """Token ids and trained mask of one example, both of shape (tokens,)."""
        part = bisect_right(self._starts, index) - 1
        return self.stores[part].example(index - self._starts[part])

    def num_positions(self, index: int) -> int:
        """Predicted positions of one example: its tokens less one."""
        return int(self.lengths[index]) - 1

    def names(self, members: Sequence[int]) -> str:
        """``a.jsonl:17, a.jsonl:3``, or their numbers, from 1, where lines are not known."""
        sources = [
            NamedSource(path=part.path, files=part.files, members=part.examples, place=store.place)
            for part, store in zip(self.parts, self.stores, strict=True)
        ]
        return named_members("example", members, sources)

    @property
    def mix(self) -> SourceMix:
        """How the sources are mixed."""
        return SourceMix(
            sizes=tuple(part.examples for part in self.parts), weights=tuple(part.weight for part in self.parts)
        )

    def order(self, seed: int) -> Order:
        """Which example comes when in training."""
        return self.mix.order(seed)

    def accounts(self) -> list[list[str]]:
        """Lines about each source: its examples, what it has in an epoch where weights say so, what is not learned."""
        limit = "" if self.seq_length == NO_LIMIT else f" (sequence length {self.seq_length})"
        return [
            [f"{part.summary()}{limit}{note}", *part.counts.notes(part.path)]
            for part, note in zip(self.parts, self.mix.notes(), strict=True)
        ]

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [*(line for account in self.accounts() for line in account), *filter(None, [self.note])]


def load_sft_dataset(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, cache: TokenCache | None = None
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
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, cache: TokenCache | None
) -> tuple[list[_Loaded], str]:
    """All sources, and where they are mapped from, for the log."""
    if not sources:
        return [], ""
    digests = [[file_digest(file) for file in source.files] for source in sources]
    decisive = ["sft", [named(*each) for each in zip(sources, digests, strict=True)], *asked_of(tokenizer, rules)]
    found = tokenized(cache, decisive, lambda: _tokenize(sources, tokenizer, rules))
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
        examples, of_source, account = _read_source(source, tokenizer, rules, faults)
        kept += examples
        places += places_in(source.files, of_source)
        accounts.append({"examples": len(examples), **account})
    faults.raise_if_any()
    return Tokenized(store=ExamplesInMemory.of(kept, places), account={"sources": accounts})


def _read_source(
    source: SourceFiles, tokenizer: Tokenizer, rules: ExampleRules, faults: Faults
) -> tuple[list[Encoded], list[str], dict[str, Any]]:
    """The examples of a source, the places of their records, and the account of it; no examples where all records have
    a fault."""
    kept: list[Encoded] = []
    places: list[str] = []
    formats: set[DataFormat] = set()
    counts = SftCounts()
    reader, faults_before = RecordReader(rules.records), len(faults)
    for example in read_examples(source, reader, tokenizer, rules.loss, faults):
        formats.add(example.format)
        try:
            check_predicts(example)
            spans = spans_of(example, rules)
        except RecordRefused as refused:
            faults.add(example.place, refused)
            continue
        kept += [(example.ids[start:stop], example.trained[start:stop]) for start, stop in spans]
        places += [example.place] * len(spans)
        counts.add(example, spans, rules)
    if kept or len(faults) == faults_before:
        _check_not_empty(len(kept), source, counts, rules)
        counts.check_answers(source.path)
    return kept, places, {"formats": sorted(formats), "counts": asdict(counts), "use": asdict(reader.use())}


def _open_source(source: SourceFiles, prefix: str, tokenizer: Tokenizer, rules: ExampleRules) -> _Loaded:
    store, facts = open_preprocessed(prefix, tokenizer, rules)
    _check_not_empty(facts.examples, source, facts.counts, rules)
    facts.counts.check_answers(source.path)
    part = _part(source, facts.formats, facts.examples, facts.counts, facts.use)
    return store, part, {"weight": source.weight, **facts.origin}


def _check_not_empty(examples: int, source: SourceFiles, counts: SftCounts, rules: ExampleRules) -> None:
    if examples == 0:
        dropped = f"all {counts.dropped} were longer than --seq-length {rules.seq_length}"
        reason = dropped if counts.dropped else "it is empty"
        raise UserError(f"the data file {source.path} holds no example to train on: {reason}.")


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
