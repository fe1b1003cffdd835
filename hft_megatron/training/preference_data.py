"""What preference tuning gives a run: pairs of answers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import RunConfig
from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.data.order import SampleStream
from hft_megatron.data.pair_batches import PairBatches, PairValidation
from hft_megatron.data.pairs import PairDataset
from hft_megatron.data.run_data import training_pairs, validation_pairs
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.training.samples import sample_stream


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """The ``RunData`` of --train-data-path and --valid-data-path where they hold pairs.

    Pairs have numbers: those of training come first, and those of validation behind them.
    """

    train: PairDataset
    valid: PairDataset | None
    samples: SampleStream
    """The training pairs, or packs of them, in their order."""
    order_digest: None = None
    packed: bool
    eval_iters: int | None
    pad_id: int

    @property
    def digest(self) -> str:
        return self.train.digest

    @property
    def uses_chat_template(self) -> bool:
        return self.train.uses_chat_template

    def describe(self) -> list[str]:
        return [line for dataset in (self.train, self.valid) if dataset is not None for line in dataset.describe()]

    def training(self, share: BatchShare) -> PairBatches:
        return PairBatches(dataset=self.train, pad_id=self.pad_id, share=share, order=self.samples, packed=self.packed)

    def validation(self, share: BatchShare) -> PairValidation | None:
        if self.valid is None:
            return None
        return PairValidation(
            dataset=self.valid,
            pad_id=self.pad_id,
            share=share,
            first_pair=len(self.train),
            limit=self.eval_iters,
        )

    def passes(self, share: BatchShare) -> Iterator[tuple[PairDataset, Iterator[StepBatch]]]:
        """Each data set with batches of all its pairs, which count from 0 in each."""
        yield self.train, self._training_pass(self.training(share))
        if self.valid is not None:
            batches = PairValidation(dataset=self.valid, pad_id=self.pad_id, share=share)
            yield self.valid, batches.steps(iteration=0)

    def _training_pass(self, batches: PairBatches) -> Iterator[StepBatch]:
        """The first epoch's own steps, so that numbers come out of the shapes that training has, then what a mixture
        leaves out of an epoch."""
        size = batches.share.global_batch_size
        left = np.ones(len(self.train), dtype=np.bool_)
        for consumed in range(0, self.samples.epoch_starts(1)[1], size):
            for position in range(consumed, consumed + size):
                left[list(self.samples.sample(position))] = False
            yield batches.step(consumed)
        rest = np.flatnonzero(left)
        for start in range(0, len(rest), size):
            yield batches.assemble([(int(pair),) for pair in rest[start : start + size]], packed=False)


def read_preference_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> PreferenceData:
    """Reads and tokenizes all sources. Raises UserError for a source without files and for a mistake in them."""
    seq_length = derived.sequence_length(config.training, shape)
    train = training_pairs(config.data, tokenizer, seq_length, config.dpo.dpo_bad_pairs)
    assert train is not None, "validate() refuses a run without data"
    return PreferenceData(
        train=train,
        valid=validation_pairs(config.data, tokenizer, seq_length, config.dpo.dpo_bad_pairs),
        samples=_samples(config, train),
        packed=config.data.packing,
        eval_iters=config.logging.eval_iters,
        pad_id=tokenizer.pad_id,
    )


def _samples(config: RunConfig, dataset: PairDataset) -> SampleStream:
    halves = dataset.answers.lengths.astype(np.int64) - 1
    # A pack has the room of a pair's two sequences, so that every pair fits.
    room = 2 * dataset.seq_length
    return sample_stream(dataset.order(config.training.seed), halves.reshape(-1, 2).sum(axis=1), room, config.data)
