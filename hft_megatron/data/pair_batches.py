"""Cuts preference pairs into steps and micro-batches.

A sample is a pair, or under --packing several pairs one behind the other. The two halves of a pair are always in the
same micro-batch: as two sequences of their own, or as two segments of a pack, whose room is twice the sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hft_megatron.data.batches import Batches, BatchesInOrder, SampleBatches, ShuffledBatches, StepBatch
from hft_megatron.data.pairs import PairDataset


@dataclass(frozen=True, kw_only=True)
class _OfPairs(SampleBatches):
    """Of pairs; ``share`` counts samples, as the options do."""

    dataset: PairDataset
    first_pair: int = 0
    """Number of the data set's first pair among all of a run, those of training and of validation."""

    def assemble(self, samples: Sequence[Sequence[int]], *, packed: bool) -> StepBatch:
        """Micro-batches hold, besides what those of examples do, ``pairs`` (n,) int64, the numbers of their pairs,
        and ``answers`` (n, 2) int64, the sequence or segment that each half is in, chosen and rejected.
        """
        halves = [[half for pair in sample for half in (2 * pair, 2 * pair + 1)] for sample in samples]
        share, answers = self.share, self.dataset.answers
        if packed:
            answers = replace(answers, seq_length=2 * answers.seq_length)
            rows = halves
        else:
            share = replace(
                share, micro_batch_size=2 * share.micro_batch_size, global_batch_size=2 * share.global_batch_size
            )
            rows = [[half] for sample in halves for half in sample]
        batches = Batches(dataset=answers, pad_id=self.pad_id, share=share)
        batch = batches.assemble(rows, packed=packed)
        for start, micro_batch in zip(self.share.micro_batch_starts(), batch.micro_batches, strict=True):
            mine = samples[start : start + self.share.micro_batch_size]
            micro_batch["pairs"] = self.first_pair + torch.tensor(
                [pair for sample in mine for pair in sample], dtype=torch.int64
            )
            micro_batch["answers"] = self._answers(mine, micro_batch if packed else None)
        return batch

    def _answers(self, samples: Sequence[Sequence[int]], packed: dict[str, torch.Tensor] | None) -> torch.Tensor:
        pairs = sum(len(sample) for sample in samples)
        if packed is None:
            return torch.arange(2 * pairs).view(pairs, 2)
        # Each row ends in a segment of padding unless its pairs fill it.
        capacity = packed["tokens"].numel() // self.share.micro_batch_size
        segment = 0
        numbers: list[int] = []
        for sample in samples:
            numbers += range(segment, segment + 2 * len(sample))
            filled = sum(self.dataset.num_positions(pair) for pair in sample)
            segment += 2 * len(sample) + (filled < capacity)
        return torch.tensor(numbers, dtype=torch.int64).view(pairs, 2)


@dataclass(frozen=True, kw_only=True)
class PairBatches(_OfPairs, ShuffledBatches):
    """Pairs, or packs of them, for training."""


@dataclass(frozen=True, kw_only=True)
class PairValidation(_OfPairs, BatchesInOrder):
    """Pairs for validation."""
