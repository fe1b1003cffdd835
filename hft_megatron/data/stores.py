"""Where the tokens of a source's examples lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
