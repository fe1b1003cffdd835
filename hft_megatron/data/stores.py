"""Where the tokens of a source's examples lie, and the words for examples of several sources."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MOST_NAMED = 8
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids of an example and which of them are trained, both of shape (tokens,)."""


class ExampleStore(Protocol):
    """The examples of one source, numbered from 0."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, shape (examples,)."""

    def example(self, index: int) -> Encoded:
        """One example."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesInMemory:
    """Examples end to end in two flat arrays."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``; shape (examples + 1,)."""

    @staticmethod
    def of(examples: Sequence[Encoded]) -> "ExamplesInMemory":
        """Copies of at least one example."""
        return ExamplesInMemory(
            tokens=np.concatenate([ids for ids, _ in examples]),
            trained=np.concatenate([mask for _, mask in examples]),
            offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in examples])]).astype(np.int64),
        )

    def part(self, first: int, count: int) -> "ExamplesInMemory":
        """``count`` examples from ``first`` on, in the same memory."""
        return replace(self, offsets=self.offsets[first : first + count + 1])

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self.offsets).astype(np.int32)

    def example(self, index: int) -> Encoded:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.trained[span]


def named_members(kind: str, members: Sequence[int], sources: Sequence[tuple[str, int]]) -> str:
    """``examples 3 and 17 of a.jsonl, example 1 of b.jsonl``: numbers of ``kind``, from 1 in each source.

    ``members`` are numbered from 0 over all ``sources``, each of a path and how many it has.
    """
    starts = list(accumulate((count for _, count in sources), initial=0))
    found: dict[int, list[int]] = {}
    for member in members:
        source = bisect_right(starts, member) - 1
        found.setdefault(source, []).append(member - starts[source] + 1)
    return ", ".join(f"{numbered(kind, found[source])} of {sources[source][0]}" for source in sorted(found))


def numbered(kind: str, numbers: Sequence[int]) -> str:
    """``example 3``, ``examples 3, 17``, or the first ``_MOST_NAMED`` of them and how many more there are."""
    listed = ", ".join(str(number) for number in numbers[:_MOST_NAMED])
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {listed}{more}"
