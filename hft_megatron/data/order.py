"""The order of examples, alone or in packs: a pure function of seed and position, so a run resumes by one number.

Nothing depends on ranks or micro-batches. The permutation sorts the raw output of PCG64, the part of numpy whose
numbers are promised to stay the same; ``Generator.permutation`` is not.

An epoch's examples, in their shuffled order, are cut into windows; each window is packed on its own and the epoch's
packs are shuffled. So the packs are a pure function of seed, epoch and data, new in every epoch, and the same at every
layout and micro-batch size. Attention stays within an example (``model/torch_attention``).
"""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config import derived
from hft_megatron.config.data import DataConfig, PackingAlgorithm
from hft_megatron.config.optimizer import warmup_fits
from hft_megatron.config.run import RunConfig


class SampleStream(Protocol):
    """The endless samples of a run. A sample is what --global-batch-size counts: an example, or a pack of them."""

    def sample(self, consumed: int) -> Sequence[int]:
        """The examples of the sample that follows ``consumed`` samples."""

    def epoch_starts(self, stop: int) -> Sequence[int]:
        """Numbers of samples before each epoch, from 0 up to and with the first number that is at least ``stop``."""


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

    A source gives its examples in passes: each example once, in a new order in each pass, and an epoch continues where
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
    """Sizes of the sources, and their weights in --train-data-path: all have one, or none."""

    sizes: tuple[int, ...]
    weights: tuple[float | None, ...]

    @property
    def shares(self) -> tuple[int, ...] | None:
        """Samples of each source in an epoch, None where sources have no weights."""
        weights = [weight for weight in self.weights if weight is not None]
        return shares_of_epoch(self.sizes, weights) if weights else None

    def order(self, seed: int) -> Order:
        """The order of examples in training: each once in an epoch, or each source by its weight."""
        shares, whole = self.shares, sum(self.sizes)
        if shares is None:
            return SampleOrder(num_examples=whole, seed=seed)
        return MixtureOrder(num_examples=whole, seed=seed, sizes=self.sizes, shares=shares)

    def notes(self) -> list[str]:
        """End of each source's line in the log: its samples in an epoch, where it has a weight."""
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


_EPOCHS_KEPT = 2
"""A batch may hold the end of one epoch and the beginning of the next."""
_WINDOWS_AT_ONCE = 256
"""Windows packed side by side: enough that numpy's work outweighs its calls, few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """Rules for packing examples."""

    capacity: int
    """Positions of a pack: the sequence length."""
    algorithm: PackingAlgorithm
    window: int
    """Number of examples that are packed together."""


class EpochPacks(Sequence[NDArray[np.int64]]):
    """The packs of an epoch, in the order of training. Three flat arrays: an epoch may have millions."""

    def __init__(self, examples: NDArray[np.int64], bounds: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        """Pack k is ``examples[bounds[j]:bounds[j + 1]]``, j = ``order[k]``; (examples,), (packs + 1,), (packs,)."""
        self.examples = examples
        self._bounds = bounds
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NDArray[np.int64]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.int64] | Sequence[NDArray[np.int64]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        pack = int(self._order[index])
        return self.examples[self._bounds[pack] : self._bounds[pack + 1]]


class PackedOrder:
    """Endless epochs of packs; every epoch packs each example of ``order`` once."""

    def __init__(self, order: Order, lengths: NDArray[np.signedinteger[Any]], rule: PackingRule) -> None:
        """``lengths`` are the positions of each example, shape (examples,), none above the rule's capacity."""
        assert 0 < int(lengths.min()) <= int(lengths.max()) <= rule.capacity
        self.order = order
        self.rule = rule
        self._lengths = lengths
        self._starts = [0]
        self._epochs: dict[int, EpochPacks] = {}

    def sample(self, consumed: int) -> Sequence[int]:
        """The examples of the pack that follows ``consumed`` packs."""
        starts = self.epoch_starts(consumed + 1)
        epoch = bisect_right(starts, consumed) - 1
        examples: list[int] = self.packs(epoch)[consumed - starts[epoch]].tolist()
        return examples

    def epoch_starts(self, stop: int) -> Sequence[int]:
        """See ``SampleStream``. Epochs differ in their numbers of packs, so all before ``stop`` are packed for it."""
        while self._starts[-1] < stop:
            self._starts.append(self._starts[-1] + len(self.packs(len(self._starts) - 1)))
        return self._starts

    def packs(self, epoch: int) -> EpochPacks:
        """The examples of each pack of an epoch, in the order of training."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._packed(epoch)
        return self._epochs[epoch]

    def fill(self, epoch: int) -> float:
        """The share of an epoch's positions, packs x capacity, that its examples fill."""
        packs = self.packs(epoch)
        return int(self._lengths[packs.examples].sum(dtype=np.int64)) / (len(packs) * self.rule.capacity)

    def _packed(self, epoch: int) -> EpochPacks:
        examples = self.order.epoch(epoch)
        packed = np.empty(len(examples), dtype=np.int64)
        windows = -(-len(examples) // self.rule.window)
        edges = _window_edges(len(examples), windows)
        bounds = []
        for first in range(0, windows, _WINDOWS_AT_ONCE):
            group = edges[first : first + _WINDOWS_AT_ONCE + 1]
            begin, end = int(group[0]), int(group[-1])
            packed[begin:end], starts = self._packed_windows(examples[begin:end], np.diff(group))
            bounds.append(begin + starts)
        bounds.append(np.array([len(examples)]))
        every = np.concatenate(bounds)
        return EpochPacks(packed, every, permutation(len(every) - 1, f"seed {self.order.seed}, epoch {epoch}, packs"))

    def _packed_windows(
        self, examples: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The examples of windows of these sizes, pack after pack, and the start of each pack among them."""
        columns = np.arange(int(sizes.max()))
        present = columns < sizes[:, None]  # (windows, longest window)
        window = np.zeros(present.shape, dtype=np.int64)
        window[present] = examples
        # Missing entries have no length: they fit anywhere, and are left out below.
        lengths = np.where(present, self._lengths[window], 0)
        if self.rule.algorithm == "first_fit_decreasing":
            by_length = np.argsort(-lengths, axis=1, kind="stable")
            window, lengths = (np.take_along_axis(array, by_length, axis=1) for array in (window, lengths))
        numbers = np.where(present, first_fit(lengths, self.rule.capacity), len(columns))
        by_pack = np.argsort(numbers, axis=1, kind="stable")
        window, numbers = (np.take_along_axis(array, by_pack, axis=1)[present] for array in (window, numbers))
        begins = np.zeros(present.shape, dtype=np.bool_)
        begins[:, 0] = True
        starts = begins[present]
        starts[1:] |= np.diff(numbers) != 0
        return window, np.flatnonzero(starts)


def _window_edges(examples: int, windows: int) -> NDArray[np.int64]:
    """Starts of the windows, and the end: sizes differ by one at most, and the larger ones come first."""
    size, larger = divmod(examples, windows)
    numbers = np.arange(windows + 1)
    return numbers * size + np.minimum(numbers, larger)


def first_fit(lengths: NDArray[np.signedinteger[Any]], capacity: int) -> NDArray[np.int64]:
    """Puts each length of each row, in the given order, into the row's first pack that has room for it.

    (rows, n) -> the number of its pack, from 0 in each row, (rows, n). With lengths in decreasing order this is
    first-fit decreasing, which needs at most 11/9 of the fewest possible packs, plus 6/9 (Dosa, 2007).
    """
    rows = np.arange(len(lengths))
    room = np.full(lengths.shape, capacity, dtype=np.int32)
    numbers = np.empty(lengths.shape, dtype=np.int64)
    used = 0
    for item, column in enumerate(np.ascontiguousarray(lengths.T.astype(np.int32))):
        # One pack more than is used: the last one is empty and takes anything.
        pack = np.argmax(room[:, : used + 1] >= column[:, None], axis=1)
        room[rows, pack] -= column
        numbers[:, item] = pack
        used = max(used, int(pack.max()) + 1)
    return numbers


def sample_stream(
    order: Order, positions: NDArray[np.signedinteger[Any]], room: int, options: DataConfig
) -> SampleStream:
    """The examples of ``order``, or packs of them under --packing; a function of its arguments alone.

    ``positions`` are those of each example, of shape (examples,); a pack has at most ``room`` of them.
    """
    if not options.packing:
        return order
    rule = PackingRule(capacity=room, algorithm=options.packing_algorithm, window=options.packing_window)
    return PackedOrder(order, positions, rule)


def with_iterations(config: RunConfig, samples: SampleStream, world_size: int) -> RunConfig:
    """Converts --train-epochs to --train-iters: enough to train the last sample of the last epoch.

    Raises UserError for a warm-up that takes all of them.
    """
    epochs = config.training.train_epochs
    if epochs is None:
        return config
    iterations = derived.batch_sizes(config, world_size).first_from(samples_of_epochs(samples, epochs))
    warmup_fits(config.optimizer, iterations)
    return replace(config, training=replace(config.training, train_iters=iterations, train_epochs=None))


def samples_of_epochs(samples: SampleStream, epochs: int) -> int:
    """Number of samples in the first ``epochs``; packed epochs differ in their number."""
    starts = samples.epoch_starts(1)
    while len(starts) <= epochs:
        starts = samples.epoch_starts(starts[-1] + 1)
    return starts[epochs]


def describe_samples(samples: SampleStream, epochs: int | None, iterations: int) -> Iterator[str]:
    """Lines for the log: the fill of packs, and the samples and iterations of --train-epochs."""
    if isinstance(samples, PackedOrder):
        rule = samples.rule
        yield (
            f"packed by {rule.algorithm} in windows of {rule.window}: {len(samples.packs(0))} packs of {rule.capacity} "
            f"positions in the first epoch, {1 - samples.fill(0):.2%} padding"
        )
    if epochs is not None:
        kind = "packs" if isinstance(samples, PackedOrder) else "examples"
        yield f"--train-epochs {epochs}: {samples_of_epochs(samples, epochs)} {kind} in {iterations} iterations"
