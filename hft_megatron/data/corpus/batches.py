"""Cuts the samples of a corpus into steps, and each step's global batch into one rank's micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.data.corpus.datasets import Samples
from hft_megatron.data.stores import numbered

FIELDS = ("tokens", "labels", "loss_mask")


@dataclass(frozen=True, kw_only=True)
class CorpusBatches:
    """Training: the samples one after the other, ``global_batch_size`` at a step; each is exactly ``seq_length``."""

    samples: Samples
    seq_length: int
    share: BatchShare

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks); reads this rank's rows only."""
        micro_batches = []
        for start in self.share.micro_batch_starts():
            first = consumed_samples + start
            rows = [self.samples[first + row] for row in range(self.share.micro_batch_size)]
            micro_batches.append({name: torch.stack([row[name] for row in rows]) for name in FIELDS})
        return StepBatch(
            sequences=self.share.micro_batch_size,
            seq_length=self.seq_length,
            micro_batches=micro_batches,
            tokens=self.share.global_batch_size * self.seq_length,
            squared_lengths=self.share.global_batch_size * self.seq_length**2,
        )

    def names(self, samples: Sequence[int]) -> str:
        """Numbers from 1 in megatron-core's order: its shuffle and blend decide what they hold."""
        return f"{numbered('sample', [sample + 1 for sample in samples])} of the run"


@dataclass(frozen=True, kw_only=True)
class CorpusValidation:
    """Validation: as in Megatron every one goes on where the last one stopped."""

    batches: CorpusBatches
    eval_iters: int
    eval_interval: int | None
    """Validations stand at its multiples and at the end of the run; only there when None."""

    def steps(self, iteration: int) -> Iterator[StepBatch]:
        """``eval_iters`` steps, which follow from the number of validations before this one."""
        before = 0 if self.eval_interval is None else (iteration - 1) // self.eval_interval
        for step in range(before * self.eval_iters, (before + 1) * self.eval_iters):
            yield self.batches.step(step * self.batches.share.global_batch_size)


def validation_samples(*, train_iters: int, eval_interval: int | None, eval_iters: int, global_batch_size: int) -> int:
    """Samples of all validations of a run, by Megatron's formula: one at every interval, and one at the end."""
    validations = 1 if eval_interval is None else train_iters // eval_interval + 1
    return validations * eval_iters * global_batch_size
