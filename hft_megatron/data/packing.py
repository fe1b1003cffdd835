"""Packing: examples that together fit the sequence length share one training sequence, a pack.

An epoch's examples, in their shuffled order, are cut into windows; each window is packed on its own and the epoch's
packs are shuffled. So the packs are a pure function of seed, epoch and data, new in every epoch, and the same at every
layout and micro-batch size. Attention stays within an example (``model/packed_attention``).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.schema import PackingAlgorithm
from hft_megatron.data.order import Order, permutation

_EPOCHS_KEPT = 2
"""A batch may hold the end of one epoch and the beginning of the next."""


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """How examples are put together."""

    capacity: int
    """Positions of a pack: the sequence length."""
    algorithm: PackingAlgorithm
    window: int
    """Examples that are packed together."""


class PackedOrder:
    """Endless epochs of packs; every epoch packs each example that ``order`` has in it once."""

    def __init__(self, order: Order, lengths: NDArray[np.int64], rule: PackingRule) -> None:
        """``lengths`` are the positions of each example, shape (examples,), none above the rule's capacity."""
        assert int(lengths.max()) <= rule.capacity
        self.order = order
        self.rule = rule
        self._lengths = lengths
        self._starts = [0]
        self._epochs: dict[int, list[NDArray[np.int64]]] = {}

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

    def packs(self, epoch: int) -> list[NDArray[np.int64]]:
        """The examples of each pack of an epoch, in the order they are trained in."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._packed(epoch)
        return self._epochs[epoch]

    def fill(self, epoch: int) -> float:
        """The share of an epoch's positions, packs x capacity, that its examples fill."""
        packs = self.packs(epoch)
        return int(self._lengths[np.concatenate(packs)].sum()) / (len(packs) * self.rule.capacity)

    def _packed(self, epoch: int) -> list[NDArray[np.int64]]:
        examples = self.order.epoch(epoch)
        packs: list[NDArray[np.int64]] = []
        for window in np.array_split(examples, -(-len(examples) // self.rule.window)):
            if self.rule.algorithm == "first_fit_decreasing":
                window = window[np.argsort(-self._lengths[window], kind="stable")]
            numbers = first_fit(self._lengths[window], self.rule.capacity)
            by_pack = np.argsort(numbers, kind="stable")
            packs += np.split(window[by_pack], np.flatnonzero(np.diff(numbers[by_pack])) + 1)
        shuffled = permutation(len(packs), f"seed {self.order.seed}, epoch {epoch}, packs")
        return [packs[number] for number in shuffled]


def first_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Puts each length, in the given order, into the first pack that has room for it; (n,) -> its pack's number, (n,).

    Packs are numbered from 0. With lengths in decreasing order this is first-fit decreasing, which needs at most 11/9
    of the fewest possible packs, plus 6/9 (Dosa, 2007).
    """
    room = np.full(len(lengths), capacity, dtype=np.int64)
    numbers = np.empty(len(lengths), dtype=np.int64)
    used = 0
    for item, length in enumerate(lengths.tolist()):
        # One pack more than are used: the last one is empty and takes anything.
        pack = int(np.argmax(room[: used + 1] >= length))
        room[pack] -= length
        numbers[item] = pack
        used = max(used, pack + 1)
    return numbers
