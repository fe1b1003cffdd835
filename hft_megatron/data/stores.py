"""Where the tokens of a source's examples lie, and the words for examples of several sources."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MOST_NAMED = 8
_OF_RECORD = re.compile(r"(.*)(:\d+(?:, record \d+)?|: row \d+)", re.DOTALL)
"""Places of lines, of records of an array, and of rows of a Parquet file."""
_PLACE = re.compile(r"(\d+)(:.*)")
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids of an example and which of them are trained, both of shape (tokens,)."""


class ExampleStore(Protocol):
    """The examples of one source, numbered from 0."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, shape (examples,)."""

    def example(self, index: int) -> Encoded:
        """One example."""

    def place(self, index: int) -> str:
        """Where an example's record is, as ``places_in`` has it; empty where that isn't kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesInMemory:
    """Examples end to end in two flat arrays."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``; shape (examples + 1,)."""
    places: NDArray[np.bytes_]
    """Where the examples' records are, as ``places_in`` has it; shape (examples,)."""

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


@dataclass(frozen=True, kw_only=True)
class NamedSource:
    """Members of one source, examples or pairs, and where each comes from."""

    path: str
    """As written."""
    files: tuple[str, ...]
    members: int
    place: Callable[[int], str]
    """Of a member by number: as ``place_in`` has it, or empty."""

    def word(self, kind: str, member: int) -> str:
        """``a.jsonl:17``, or ``example 3 of a`` where nothing but the number (from 1) is known."""
        place = _PLACE.fullmatch(self.place(member))
        return f"{kind} {member + 1} of {self.path}" if place is None else f"{self.files[int(place[1])]}{place[2]}"


def named_members(kind: str, members: Sequence[int], sources: Sequence[NamedSource]) -> str:
    """``a.jsonl:17, a.jsonl:3 and 6 more``: where ``members``, numbered from 0 over all ``sources``, come from."""
    starts = list(accumulate((source.members for source in sources), initial=0))
    words = []
    for member in members[:_MOST_NAMED]:
        source = bisect_right(starts, member) - 1
        words.append(sources[source].word(kind, member - starts[source]))
    more = f" and {len(members) - _MOST_NAMED} more" if len(members) > _MOST_NAMED else ""
    return ", ".join(words) + more


def places_in(files: Sequence[Path], places: Sequence[str]) -> list[str]:
    """``0:17`` of ``a.jsonl:17``: the number of a record's file among a source's, and what follows the file's name."""
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
