"""Assembles the batch of the next step on a thread while the engine works on this one."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from hft_megatron.data.batches import BatchShare, StepBatch, TrainingSteps


class PrefetchedSteps:
    """Training steps of which the next one is there when it is asked for; what its assembly raises, ``step`` raises.

    On a machine with CUDA the tensors are pinned, so that they reach the device while it works.
    """

    def __init__(self, steps: TrainingSteps, *, stop: int) -> None:
        """``stop`` samples (over all ranks) are all that the run takes: no step after them is assembled."""
        self._steps = steps
        self._stop = stop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[StepBatch]] | None = None

    @property
    def share(self) -> BatchShare:
        """This rank's part of every step."""
        return self._steps.share

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks); any, but only the next one is there at once."""
        if self._next is None or self._next[0] != consumed_samples:
            self._begin(consumed_samples)
        assert self._next is not None
        batch = self._next[1].result()
        self._next = None
        following = consumed_samples + self.share.global_batch_size
        if following < self._stop:
            self._begin(following)
        return batch

    def names(self, samples: Sequence[int]) -> str:
        """Words for samples of the run."""
        return self._steps.names(samples)

    def _begin(self, consumed_samples: int) -> None:
        # One thread, so that a step nobody took ends before: the order of samples keeps an epoch in mind.
        self._next = consumed_samples, self._thread.submit(self._assembled, consumed_samples)

    def _assembled(self, consumed_samples: int) -> StepBatch:
        batch = self._steps.step(consumed_samples)
        if not torch.cuda.is_available():
            return batch
        pinned = [{name: tensor.pin_memory() for name, tensor in one.items()} for one in batch.micro_batches]
        return replace(batch, micro_batches=pinned)
