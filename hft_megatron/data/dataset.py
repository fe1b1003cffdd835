"""The examples of a run, source after source, in memory or mapped from the disk, and the places of their records.

The model sees ``tokens[:-1]`` of an example and predicts ``tokens[1:]``, so an example of L tokens has L-1 positions,
and that number is what the sequence length limits.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.names import DataFormat
from hft_megatron.data.examples import NO_LIMIT, ExampleRules, SftCounts
from hft_megatron.data.order import Order, SourceMix
from hft_megatron.data.record_errors import RecordUse
from hft_megatron.data.tokenizer import Encoded, Tokenizer


class ExampleStore(Protocol):
    """The examples of one source, numbered from 0."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, shape (examples,)."""

    def example(self, index: int) -> Encoded:
        """The example with this number."""

    def place(self, index: int) -> str:
        """Place of an example's record, in the form of ``places_in``; empty where that isn't kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesInMemory:
    """Examples end to end in two flat arrays."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``; shape (examples + 1,)."""
    places: NDArray[np.bytes_]
    """Places of the examples' records, in the form of ``places_in``; shape (examples,)."""

    @staticmethod
    def of(examples: Sequence[Encoded], places: Sequence[str]) -> "ExamplesInMemory":
        """Copies of at least one example, whose records are at ``places``."""
        return ExamplesInMemory(
            tokens=np.concatenate([ids for ids, _ in examples]),
            trained=np.concatenate([mask for _, mask in examples]),
            offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in examples])]).astype(np.int64),
            places=np.array(places, dtype=np.bytes_),
        )

    def part(self, first: int, count: int) -> "ExamplesInMemory":
        """``count`` examples from ``first`` on, in the same memory."""
        return replace(self, offsets=self.offsets[first : first + count + 1], places=self.places[first : first + count])

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self.offsets).astype(np.int32)

    def example(self, index: int) -> Encoded:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.trained[span]

    def place(self, index: int) -> str:
        return bytes(self.places[index]).decode()


_OF_RECORD = re.compile(r"(.*)(:\d+(?:, record \d+)?|: row \d+)", re.DOTALL)
"""Places of lines, of records of an array, and of rows of a Parquet file."""
_PLACE = re.compile(r"(\d+)(:.*)")
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class NamedSource:
    """Members of one source, examples or pairs, and their places in the files."""

    path: str
    """Path as written."""
    files: tuple[str, ...]
    members: int
    place: Callable[[int], str]
    """Place of a member by number, in the form of ``places_in``, or empty."""

    def word(self, kind: str, member: int) -> str:
        """``a.jsonl:17``, or ``example 3 of a`` where only the number (from 1) is known."""
        place = _PLACE.fullmatch(self.place(member))
        return f"{kind} {member + 1} of {self.path}" if place is None else f"{self.files[int(place[1])]}{place[2]}"


def named_members(kind: str, members: Sequence[int], sources: Sequence[NamedSource]) -> str:
    """``a.jsonl:17, a.jsonl:3 and 6 more``: the places of ``members``, numbered from 0 over all ``sources``."""
    starts = list(accumulate((source.members for source in sources), initial=0))
    words = []
    for member in members[:_MOST_NAMED]:
        source = bisect_right(starts, member) - 1
        words.append(sources[source].word(kind, member - starts[source]))
    more = f" and {len(members) - _MOST_NAMED} more" if len(members) > _MOST_NAMED else ""
    return ", ".join(words) + more


def places_in(files: Sequence[Path], places: Sequence[str]) -> list[str]:
    """``0:17`` for ``a.jsonl:17``: the number of a record's file in its source, and the text after the file's name."""
    numbers = {str(file): number for number, file in enumerate(files)}
    found = []
    for place in places:
        match = _OF_RECORD.fullmatch(place)
        assert match is not None, place
        found.append(f"{numbers[match[1]]}{match[2]}")
    return found


def numbered(kind: str, numbers: Sequence[int]) -> str:
    """``example 3``, ``examples 3, 17``, or the first ``_MOST_NAMED`` of them and how many more there are."""
    listed = ", ".join(str(number) for number in numbers[:_MOST_NAMED])
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {listed}{more}"


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """The examples of one source: a range of the data set's."""

    path: str
    weight: float | None
    formats: tuple[DataFormat, ...]
    """Formats of its files."""
    files: tuple[str, ...]
    """Its files; none for preprocessed data."""
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
    """A line about the files that the tokens are mapped from."""

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
    def uses(self) -> list[RecordUse]:
        """The record rules that had an effect, by source."""
        return [part.use for part in self.parts]

    @property
    def uses_chat_template(self) -> bool:
        """True if the chat template has rendered any of it."""
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
        """The mix of the sources."""
        return SourceMix(
            sizes=tuple(part.examples for part in self.parts), weights=tuple(part.weight for part in self.parts)
        )

    def order(self, seed: int) -> Order:
        """The order of the examples in training."""
        return self.mix.order(seed)

    def accounts(self) -> list[list[str]]:
        """Lines about each source: its examples, samples per epoch if it has a weight, and what is not learned."""
        limit = "" if self.seq_length == NO_LIMIT else f" (sequence length {self.seq_length})"
        return [
            [f"{part.summary()}{limit}{note}", *part.counts.notes(part.path)]
            for part, note in zip(self.parts, self.mix.notes(), strict=True)
        ]

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [*(line for account in self.accounts() for line in account), *filter(None, [self.note])]


_READING = 2
"""Raise this when the same files, tokenizer and rules give other examples: older runs then have other data."""


def data_digest(origins: Sequence[dict[str, Any]], tokenizer: Tokenizer, rules: ExampleRules, *others: str) -> str:
    """sha256 (hex) over everything that decides the examples: the origins of each source, the tokenizer, the rules, and
    ``others`` that not every method has."""
    identity, decided = asked_of(tokenizer, rules)
    decisive = {"reading": _READING, "sources": origins, "tokenizer": identity, "rules": [decided, *others]}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def asked_of(tokenizer: Tokenizer, rules: ExampleRules) -> tuple[list[Any], dict[str, Any]]:
    """The values that decide the examples of given files: the tokenizer with its template, and the rules, as JSON."""
    facts = tokenizer.facts
    return [facts.identity, facts.chat_template, dict(facts.template_variables)], asdict(rules)
