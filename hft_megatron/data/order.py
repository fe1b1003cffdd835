"""Which example comes when: a pure function of seed and position, so a run resumes by one number.

Nothing depends on ranks or micro-batches. The permutation sorts the raw output of PCG64, the part of numpy whose
numbers are promised to stay the same; ``Generator.permutation`` is not.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Endless epochs over ``num_examples``, each in an order of its own and each example once in it."""

    num_examples: int
    seed: int

    def __post_init__(self) -> None:
        assert self.num_examples > 0

    def epoch_of(self, consumed: int) -> int:
        """The epoch, from 0, of the sample that follows ``consumed`` samples."""
        return consumed // self.num_examples

    def sample_index(self, consumed: int) -> int:
        """The example that follows ``consumed`` samples."""
        order = _permutation(self.num_examples, self.seed, self.epoch_of(consumed))
        return int(order[consumed % self.num_examples])


@lru_cache(maxsize=4)  # the current epoch and the next, for training and one other data set
def _permutation(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    key = hashlib.sha256(f"sample order, seed {seed}, epoch {epoch}".encode()).digest()
    keys = np.random.PCG64(int.from_bytes(key, "big")).random_raw(num_examples)
    return np.argsort(keys, kind="stable").astype(np.int64)
