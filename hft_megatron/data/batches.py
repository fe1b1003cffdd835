"""Micro-batches of a step, and the thread that prepares the next ones.

A sample is one sequence: an example, or with --packing several examples in sequence.

Every step's loss is the sum of the token losses under ``loss_mask`` divided by the mask's sum over the *global* batch.
That quotient doesn't change with the number of ranks, the micro-batch size or the padding, which a mean of the
micro-batches' means would: those have different numbers of trained tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from hft_megatron.config.batch_sizes import BatchSizes
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.order import SampleStream

PADDING_MULTIPLE = 64
"""Lengths are rounded up to a multiple of this: few distinct shapes, and fast ones."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One rank's part of one optimizer step."""

    sequences: int
    """Sequences of a micro-batch as the engine sees it: the micro-batch size, or 1 when packed."""
    seq_length: int
    """Padded length of the sequences, the same on every rank and in every micro-batch of the step."""
    micro_batches: list[dict[str, torch.Tensor]]
    """``tokens`` and ``labels`` int64, ``loss_mask`` float32, each of shape (sequences, seq_length). When packed also
    ``cu_seqlens`` int32, (segments + 1,): where each example, or stretch of padding, begins, and the end."""
    tokens: int
    """Positions of the whole global batch that an example fills: all except the padding."""
    squared_lengths: int
    """Sum over the examples of the whole global batch of their squared positions: the cost of attention."""


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """The rows of a global batch that a rank takes."""

    micro_batch_size: int
    """Sequences of one forward pass on one rank."""
    global_batch_size: int
    """Sequences of one step over all ranks, outside the ramp."""
    data_parallel_rank: int
    data_parallel_size: int
    length_multiple: int
    """Divisor of sequence lengths: sequence parallelism needs multiples of the tensor-parallel size."""
    ramp: tuple[int, ...] = ()
    """Value of --rampup-batch-size; empty for validation."""

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.micro_batch_size * self.data_parallel_size) == 0
        assert 0 <= self.data_parallel_rank < self.data_parallel_size

    @cached_property
    def sizes(self) -> BatchSizes:
        """Sequences of every step of the run."""
        return BatchSizes(full=self.global_batch_size, ramp=self.ramp)

    def after(self, consumed_samples: int) -> "BatchShare":
        """The part of the step after ``consumed_samples`` samples (over all ranks), whose size may differ in a ramp."""
        if not self.ramp:
            return self
        return replace(self, global_batch_size=self.sizes.after(consumed_samples), ramp=())

    def micro_batch_starts(self) -> range:
        """The first row of each of the rank's micro-batches. Micro-batch k of rank r of D, each of m rows, holds rows
        ``k*m*D + r*m`` to ``k*m*D + (r+1)*m`` of the global batch."""
        size, ranks = self.micro_batch_size, self.data_parallel_size
        return range(self.data_parallel_rank * size, self.global_batch_size, size * ranks)


class TrainingSteps(Protocol):
    """Source of a run's training steps."""

    @property
    def share(self) -> BatchShare:
        """This rank's part of every step."""

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks)."""

    def names(self, samples: Sequence[int]) -> str:
        """Names of samples for people, by the number of samples before each: their places in the data."""


class ValidationSteps(Protocol):
    """Source of a run's validation steps on one data source."""

    def steps(self, iteration: int) -> Iterator[StepBatch]:
        """Steps of the validation after ``iteration``; every rank gets the same number of them."""


class NamedMembers(Sized, Protocol):
    """A data set whose members have names for people."""

    def names(self, members: Sequence[int]) -> str:
        """Names of members by number: their sources, and their numbers in those."""


class SampleBatches(Protocol):
    """Micro-batches of samples of any kind."""

    @property
    def dataset(self) -> NamedMembers:
        """The data set of the samples."""

    @property
    def share(self) -> BatchShare:
        """This rank's part of every step."""

    def with_share(self, share: BatchShare) -> "SampleBatches":
        """The same batches for another part of a step."""

    def assemble(self, samples: Sequence[Sequence[int]], *, packed: bool) -> StepBatch:
        """A rank's tensors of a list of samples."""


@dataclass(frozen=True, kw_only=True)
class ShuffledBatches:
    """Training batches: an endless stream of shuffled samples."""

    batches: SampleBatches
    order: SampleStream
    packed: bool = False
    """True if samples are packs, whose members must not see each other."""

    @property
    def share(self) -> BatchShare:
        """This rank's part of every step."""
        return self.batches.share

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks). A step may reach into the next epoch."""
        share = self.share.after(consumed_samples)
        stop = consumed_samples + share.global_batch_size
        samples = [self.order.sample(position) for position in range(consumed_samples, stop)]
        return self.batches.with_share(share).assemble(samples, packed=self.packed)

    def names(self, samples: Sequence[int]) -> str:
        """The examples, or pairs, of ``samples`` by file and line, or by number where lines are not known."""
        return self.batches.dataset.names([member for sample in samples for member in self.order.sample(sample)])


@dataclass(frozen=True, kw_only=True)
class BatchesInOrder:
    """Validation batches: the data set in its own order, each member exactly once; every rank gets as many steps."""

    batches: SampleBatches
    limit: int | None = None
    """Number of steps to take; all when None."""

    def __len__(self) -> int:
        return -(-len(self.batches.dataset) // self.batches.share.global_batch_size)

    def steps(self, iteration: int) -> Iterator[StepBatch]:
        """The same steps after every iteration. The last one is filled up with wholly masked rows."""
        size = self.batches.share.global_batch_size
        for number in range(len(self) if self.limit is None else min(self.limit, len(self))):
            stop = min((number + 1) * size, len(self.batches.dataset))
            yield self.batches.assemble([(index,) for index in range(number * size, stop)], packed=False)


@dataclass(frozen=True, kw_only=True)
class ExampleBatches:
    """Micro-batches of examples, or of packs of them."""

    dataset: SftDataset
    pad_id: int
    share: BatchShare

    def with_share(self, share: BatchShare) -> SampleBatches:
        """The same batches for another part of a step."""
        return replace(self, share=share)

    def assemble(self, samples: Sequence[Sequence[int]], *, packed: bool) -> StepBatch:
        """The rank's rows of a global batch; rows that ``samples`` doesn't fill are padding and wholly masked.

        When packed, the rows of a micro-batch are laid end to end, because the engine knows examples only within one
        sequence.
        """
        positions = [[self.dataset.num_positions(index) for index in sample] for sample in samples]
        length = self._padded_length(positions)
        size = self.share.micro_batch_size
        shape = (1, size * length) if packed else (size, length)
        micro_batches = []
        for start in self.share.micro_batch_starts():
            rows = samples[start : start + size]
            micro_batch = {name: rectangle.view(shape) for name, rectangle in self._micro_batch(rows, length).items()}
            if packed:
                micro_batch["cu_seqlens"] = self._cu_seqlens(rows, length)
            micro_batches.append(micro_batch)
        return StepBatch(
            sequences=shape[0],
            seq_length=shape[1],
            micro_batches=micro_batches,
            tokens=sum(map(sum, positions)),
            squared_lengths=sum(length**2 for sample in positions for length in sample),
        )

    def _padded_length(self, positions: Sequence[Sequence[int]]) -> int:
        longest = max(map(sum, positions))
        limit = _round_up(self.dataset.seq_length, self.share.length_multiple)
        return min(_round_up(longest, lcm(PADDING_MULTIPLE, self.share.length_multiple)), limit)

    def _micro_batch(self, samples: Sequence[Sequence[int]], length: int) -> dict[str, torch.Tensor]:
        shape = (self.share.micro_batch_size, length)
        tokens = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, self.pad_id, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        for row, sample in enumerate(samples):
            start = 0
            for index in sample:
                ids, trained = self.dataset.example(index)
                span = slice(start, start + len(ids) - 1)
                tokens[row, span] = ids[:-1]
                labels[row, span] = ids[1:]
                loss_mask[row, span] = trained[1:]
                start = span.stop
        arrays = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _cu_seqlens(self, samples: Sequence[Sequence[int]], length: int) -> torch.Tensor:
        """Each row's examples, and its padding as a segment of its own."""
        segments = []
        for sample in samples:
            positions = [self.dataset.num_positions(index) for index in sample]
            segments += [*positions, length - sum(positions)]
        ends = np.cumsum([0, *(segment for segment in segments if segment > 0)])
        return torch.from_numpy(ends.astype(np.int32))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class RunDataset(NamedMembers, Protocol):
    """A data set that a run trains or validates on."""

    @property
    def digest(self) -> str:
        """Equal digests mean equal members in equal order."""

    @property
    def uses_chat_template(self) -> bool:
        """True if the chat template has rendered any of it."""

    def describe(self) -> list[str]:
        """Lines for the log."""


DatasetT = TypeVar("DatasetT", bound=RunDataset)


@dataclass(frozen=True, kw_only=True)
class RecordData(ABC, Generic[DatasetT]):
    """The ``RunData`` of --train-data-path and --valid-data-path."""

    train: DatasetT | None
    """None where nothing is trained."""
    valid: Mapping[str, DatasetT]
    """Validation data sets by the names of their sources."""
    samples: SampleStream | None
    """The training examples or pairs, or packs of them, in their order; None where nothing is trained."""
    packed: bool
    eval_iters: int | None
    pad_id: int
    order_digest: None = None

    @abstractmethod
    def batches(self, dataset: DatasetT, share: BatchShare, *, first: int) -> SampleBatches:
        """Micro-batches of ``dataset``, whose first member has the number ``first`` among all members of the run:
        training comes first, then validation."""

    @property
    def digest(self) -> str | None:
        return None if self.train is None else self.train.digest

    @property
    def valid_digests(self) -> dict[str, str]:
        return {name: dataset.digest for name, dataset in self.valid.items()}

    @property
    def uses_chat_template(self) -> bool:
        return self.train is not None and self.train.uses_chat_template

    def describe(self) -> list[str]:
        lines = [] if self.train is None else self.train.describe()
        for name, dataset in self.valid.items():
            # Shows which values of the log belong to which files.
            of_source = f"validation/{name}: " if len(self.valid) > 1 else ""
            lines += [f"{of_source}{line}" for line in dataset.describe()]
        return lines

    def training(self, share: BatchShare) -> ShuffledBatches:
        assert self.train is not None
        assert self.samples is not None
        batches = self.batches(self.train, share, first=0)
        return ShuffledBatches(batches=batches, order=self.samples, packed=self.packed)

    def validation(self, share: BatchShare) -> dict[str, BatchesInOrder]:
        """Validation batches, each with members of one source alone, so that other sources don't change its numbers."""
        found = {}
        first = 0 if self.train is None else len(self.train)
        for name, dataset in self.valid.items():
            found[name] = BatchesInOrder(batches=self.batches(dataset, share, first=first), limit=self.eval_iters)
            first += len(dataset)
        return found


class PrefetchedSteps:
    """Training steps, the next of which is prepared ahead; ``step`` raises the errors of its assembly.

    On a machine with CUDA the tensors are pinned, so that their transfer overlaps with compute.
    """

    def __init__(self, steps: TrainingSteps, *, stop: int) -> None:
        """``stop`` samples (over all ranks) are all that the run takes: no step after them is prepared."""
        self._steps = steps
        self._stop = stop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[StepBatch]] | None = None

    @property
    def share(self) -> BatchShare:
        """This rank's part of every step."""
        return self._steps.share

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks); any, but only the next one is prepared."""
        if self._next is None or self._next[0] != consumed_samples:
            self._begin(consumed_samples)
        assert self._next is not None
        batch = self._next[1].result()
        self._next = None
        following = consumed_samples + self.share.after(consumed_samples).global_batch_size
        if following < self._stop:
            self._begin(following)
        return batch

    def names(self, samples: Sequence[int]) -> str:
        """Names of samples of the run."""
        return self._steps.names(samples)

    def _begin(self, consumed_samples: int) -> None:
        # One thread, so that an unused step ends before the next: the order of samples remembers one epoch.
        self._next = consumed_samples, self._thread.submit(self._assembled, consumed_samples)

    def _assembled(self, consumed_samples: int) -> StepBatch:
        batch = self._steps.step(consumed_samples)
        if not torch.cuda.is_available():
            return batch
        pinned = [{name: tensor.pin_memory() for name, tensor in one.items()} for one in batch.micro_batches]
        return replace(batch, micro_batches=pinned)
