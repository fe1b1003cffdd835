"""Preference pairs as the data of a run, and their micro-batches.

A sample is a pair, or with --packing several pairs in sequence. The two halves of a pair are always in the same
micro-batch: as two sequences of their own, or as two segments of a pack of twice the sequence length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.data.batches import BatchesInOrder, BatchShare, ExampleBatches, RecordData, ShuffledBatches, StepBatch
from hft_megatron.data.loading import training_pairs, validation_pairs
from hft_megatron.data.order import SampleStream, sample_stream
from hft_megatron.data.pairs import PairDataset
from hft_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PairBatches:
    """Micro-batches of pairs, or of packs of them; ``share`` counts samples, as the options do."""

    dataset: PairDataset
    pad_id: int
    share: BatchShare
    first_pair: int = 0
    """Number of the data set's first pair among all pairs of a run, of training and of validation."""

    def with_share(self, share: BatchShare) -> "PairBatches":
        """The same batches for another part of a step."""
        return replace(self, share=share)

    def assemble(self, samples: Sequence[Sequence[int]], *, packed: bool) -> StepBatch:
        """Micro-batches hold, besides the fields of examples, ``pairs`` (n,) int64, the numbers of their pairs,
        and ``answers`` (n, 2) int64, the sequence or segment of each half, chosen and rejected.
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
        batches = ExampleBatches(dataset=answers, pad_id=self.pad_id, share=share)
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
class PreferenceData(RecordData[PairDataset]):
    """Pairs, which have numbers."""

    def batches(self, dataset: PairDataset, share: BatchShare, *, first: int) -> PairBatches:
        return PairBatches(dataset=dataset, pad_id=self.pad_id, share=share, first_pair=first)

    def passes(self, share: BatchShare) -> Iterator[tuple[PairDataset, Iterator[StepBatch]]]:
        """Yields each data set with batches of all its pairs, which count from 0 in each."""
        if self.train is not None:
            yield self.train, self._training_pass(self.training(share), len(self.train))
        for dataset in self.valid.values():
            yield dataset, BatchesInOrder(batches=self.batches(dataset, share, first=0)).steps(iteration=0)

    def _training_pass(self, batches: ShuffledBatches, pairs: int) -> Iterator[StepBatch]:
        """Yields the first epoch's own steps, so that numbers come from training's shapes, then the pairs that a
        mixture leaves out of an epoch."""
        size = batches.share.global_batch_size
        left = np.ones(pairs, dtype=np.bool_)
        consumed = 0
        assert self.samples is not None
        while consumed < self.samples.epoch_starts(1)[1]:
            following = consumed + batches.share.sizes.after(consumed)
            for position in range(consumed, following):
                left[list(self.samples.sample(position))] = False
            yield batches.step(consumed)
            consumed = following
        rest = np.flatnonzero(left)
        for start in range(0, len(rest), size):
            yield batches.batches.assemble([(int(pair),) for pair in rest[start : start + size]], packed=False)


def read_preference_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> PreferenceData:
    """Reads and tokenizes all sources; training data only where something is trained.

    Raises UserError for a source without files and for an error in them.
    """
    seq_length = derived.sequence_length(config.training, shape)
    train = None
    if config.training.train_iters != 0:
        train = training_pairs(config.data, tokenizer, seq_length, config.dpo.dpo_bad_pairs)
        assert train is not None, "validate() refuses a run without data"
    return PreferenceData(
        train=train,
        valid=validation_pairs(config.data, tokenizer, seq_length, config.dpo.dpo_bad_pairs),
        samples=None if train is None else _samples(config, train),
        packed=config.data.packing,
        eval_iters=config.logging.eval_iters,
        pad_id=tokenizer.pad_id,
    )


def _samples(config: RunConfig, dataset: PairDataset) -> SampleStream:
    halves = dataset.answers.lengths.astype(np.int64) - 1
    # A pack has the room of a pair's two sequences, so that every pair fits.
    room = 2 * dataset.seq_length
    return sample_stream(dataset.order(config.training.seed), halves.reshape(-1, 2).sum(axis=1), room, config.data)
