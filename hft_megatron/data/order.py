"""Which example comes when: a pure function of seed and position, so a run resumes by one number.

Nothing depends on ranks or micro-batches. The permutation sorts the raw output of PCG64, the part of numpy whose
numbers are promised to stay the same; ``Generator.permutation`` is not.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SampleStream(Protocol):
    """The samples of a run, without end. A sample is what --global-batch-size counts: an example, or a pack of them."""

    def sample(self, consumed: int) -> Sequence[int]:
        """The examples of the sample that follows ``consumed`` samples."""

    def epoch_starts(self, stop: int) -> Sequence[int]:
        """How many samples come before each epoch, from 0 up to and with the first number that is at least ``stop``."""


@dataclass(frozen=True, kw_only=True)
class Order(ABC):
    """Endless epochs over ``num_examples``, as many samples in each as there are examples."""

    num_examples: int
    seed: int

    def __post_init__(self) -> None:
        assert self.num_examples > 0

    def epoch_of(self, consumed: int) -> int:
        """The epoch, from 0, of the sample that follows ``consumed`` samples."""
        return consumed // self.num_examples

    def sample_index(self, consumed: int) -> int:
        """The example that follows ``consumed`` samples."""
        return int(self.epoch(self.epoch_of(consumed))[consumed % self.num_examples])

    def sample(self, consumed: int) -> Sequence[int]:
        """The sample that follows ``consumed`` samples is one example."""
        return (self.sample_index(consumed),)

    def epoch_starts(self, stop: int) -> Sequence[int]:
        """Multiples of the number of examples; see ``SampleStream``."""
        return range(0, stop + self.num_examples, self.num_examples)

    @abstractmethod
    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The examples of one epoch in their order, of shape (num_examples,)."""


@dataclass(frozen=True, kw_only=True)
class SampleOrder(Order):
    """Every epoch holds each example once, in an order of its own."""

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.num_examples, f"seed {self.seed}, epoch {epoch}")


@dataclass(frozen=True, kw_only=True)
class MixtureOrder(Order):
    """Every epoch holds a fixed number of samples of each source, mixed.

    A source gives its examples in passes: each example once, in a new order in each pass, and an epoch goes on where
    the last one stopped. So all examples of a source have been seen equally often at any time, give or take one.
    """

    sizes: tuple[int, ...]
    """Examples of each source; they sum to ``num_examples`` and are numbered source after source."""
    shares: tuple[int, ...]
    """Samples of each source in one epoch; they sum to ``num_examples`` too."""

    def __post_init__(self) -> None:
        assert sum(self.sizes) == sum(self.shares) == self.num_examples > 0
        assert min(self.sizes) > 0

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        return _mixture(self.sizes, self.shares, self.seed, epoch)


@dataclass(frozen=True, kw_only=True)
class SourceMix:
    """How many examples each source has, and what --train-data-path says of its weight: all have one, or none."""

    sizes: tuple[int, ...]
    weights: tuple[float | None, ...]

    @property
    def shares(self) -> tuple[int, ...] | None:
        """Samples of each source in an epoch, None where sources have no weights."""
        weights = [weight for weight in self.weights if weight is not None]
        return shares_of_epoch(self.sizes, weights) if weights else None

    def order(self, seed: int) -> Order:
        """Which example comes when in training: each once in an epoch, or each source by its weight."""
        shares, whole = self.shares, sum(self.sizes)
        if shares is None:
            return SampleOrder(num_examples=whole, seed=seed)
        return MixtureOrder(num_examples=whole, seed=seed, sizes=self.sizes, shares=shares)

    def notes(self) -> list[str]:
        """Of each source, the end of its line in the log: what it has in an epoch, where weights say so."""
        if self.shares is None:
            return [""] * len(self.sizes)
        return [
            f"; {share} samples of it in an epoch of {sum(self.sizes)} (weight {weight:g})"
            for share, weight in zip(self.shares, self.weights, strict=True)
        ]


def shares_of_epoch(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in an epoch of ``sum(sizes)``, in proportion to the weights (largest remainders)."""
    total, whole = sum(sizes), sum(Fraction(weight) for weight in weights)
    exact = [total * Fraction(weight) / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda source: (shares[source] - exact[source], source))
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1
    return tuple(shares)


@lru_cache(maxsize=4)  # the current epoch and the next, for training and one other data set
def permutation(num_examples: int, name: str) -> NDArray[np.int64]:
    """The numbers from 0 to ``num_examples - 1`` in the order that belongs to ``name``."""
    key = hashlib.sha256(f"sample order, {name}".encode()).digest()
    keys = np.random.PCG64(int.from_bytes(key, "big")).random_raw(num_examples)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=4)
def _mixture(sizes: tuple[int, ...], shares: tuple[int, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    parts, offset = [], 0
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        start, stop = epoch * share, (epoch + 1) * share
        passes = range(start // size, -(-stop // size))
        stream = [permutation(size, f"seed {seed}, source {source}, pass {number}") for number in passes]
        skipped = passes.start * size
        if stream:
            parts.append(offset + np.concatenate(stream)[start - skipped : stop - skipped])
        offset += size
    samples = np.concatenate(parts)
    return samples[permutation(len(samples), f"seed {seed}, epoch {epoch}")]
