"""The samples that a run trains on: examples in order or packs of them, and how many iterations its epochs are.

An epoch's examples, in their shuffled order, are cut into windows; each window is packed on its own and the epoch's
packs are shuffled. So the packs are a pure function of seed, epoch and data, new in every epoch, and the same at every
layout and micro-batch size. Attention stays within an example (``model/torch_attention``).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config import derived
from hft_megatron.config.data import DataConfig, PackingAlgorithm
from hft_megatron.config.optimizer import warmup_fits
from hft_megatron.config.run import RunConfig
from hft_megatron.data.order import Order, SampleStream, permutation

_EPOCHS_KEPT = 2
"""A batch may hold the end of one epoch and the beginning of the next."""
_WINDOWS_AT_ONCE = 256
"""Windows packed side by side: enough that numpy's work outweighs its calls, few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """How examples are put together."""

    capacity: int
    """Positions of a pack: the sequence length."""
    algorithm: PackingAlgorithm
    window: int
    """Examples that are packed together."""


class EpochPacks(Sequence[NDArray[np.int64]]):
    """The packs of an epoch, in the order they are trained in. Three flat arrays: an epoch may have millions."""

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
    """Endless epochs of packs; every epoch packs each example that ``order`` has in it once."""

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
        """The examples of each pack of an epoch, in the order they are trained in."""
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
        """The examples of windows of these sizes, pack behind pack, and where each pack starts among them."""
        columns = np.arange(int(sizes.max()))
        present = columns < sizes[:, None]  # (windows, longest window)
        window = np.zeros(present.shape, dtype=np.int64)
        window[present] = examples
        # What is not there has no length: it fits anywhere, and is left out below.
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
    """Where each window begins, and the end: sizes differ by one at most, and the larger ones come first."""
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
        # One pack more than are used: the last one is empty and takes anything.
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
    """--train-epochs as --train-iters: enough that the last sample of the last epoch is trained.

    Raises UserError for a warm-up that takes all of them.
    """
    epochs = config.training.train_epochs
    if epochs is None:
        return config
    iterations = -(-samples_of_epochs(samples, epochs) // derived.global_batch_size(config, world_size))
    warmup_fits(config.optimizer, iterations)
    return replace(config, training=replace(config.training, train_iters=iterations, train_epochs=None))


def samples_of_epochs(samples: SampleStream, epochs: int) -> int:
    """How many samples the first ``epochs`` hold together; packed epochs differ in their number."""
    starts = samples.epoch_starts(1)
    while len(starts) <= epochs:
        starts = samples.epoch_starts(starts[-1] + 1)
    return starts[epochs]


def describe_samples(samples: SampleStream, epochs: int | None, iterations: int) -> Iterator[str]:
    """Lines for the log: how full packs are, and what --train-epochs comes to."""
    if isinstance(samples, PackedOrder):
        rule = samples.rule
        yield (
            f"packed by {rule.algorithm} in windows of {rule.window}: {len(samples.packs(0))} packs of {rule.capacity} "
            f"positions in the first epoch, {1 - samples.fill(0):.2%} padding"
        )
    if epochs is not None:
        kind = "packs" if isinstance(samples, PackedOrder) else "examples"
        yield f"--train-epochs {epochs}: {samples_of_epochs(samples, epochs)} {kind} in {iterations} iterations"
