"""A corpus as the data of a run, and its micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hft_megatron.config import derived
from hft_megatron.config.data import data_sources
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.data.dataset import numbered
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.methods.pretrain.datasets import Corpus, SampleCounts, Samples, mock_corpus, read_corpus

FIELDS = ("tokens", "labels", "loss_mask")


@dataclass(frozen=True, kw_only=True)
class CorpusBatches:
    """Training: the samples one after the other; each is exactly ``seq_length``."""

    samples: Samples
    seq_length: int
    share: BatchShare

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks); reads this rank's rows only."""
        share = self.share.after(consumed_samples)
        micro_batches = []
        for start in share.micro_batch_starts():
            first = consumed_samples + start
            rows = [self.samples[first + row] for row in range(share.micro_batch_size)]
            micro_batches.append({name: torch.stack([row[name] for row in rows]) for name in FIELDS})
        return StepBatch(
            sequences=share.micro_batch_size,
            seq_length=self.seq_length,
            micro_batches=micro_batches,
            tokens=share.global_batch_size * self.seq_length,
            squared_lengths=share.global_batch_size * self.seq_length**2,
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


@dataclass(frozen=True, kw_only=True)
class CorpusData:
    """The ``RunData`` of --data-path or --mock-data."""

    corpus: Corpus
    counts: SampleCounts
    logging: LoggingConfig
    uses_chat_template: bool = False
    samples: None = None
    """No epochs: all passes over a corpus are shuffled together."""

    @property
    def digest(self) -> str:
        return self.corpus.digest

    @property
    def order_digest(self) -> str:
        return self.corpus.order_digest

    def describe(self) -> list[str]:
        return [*self.corpus.lines, f"{self.counts.train:,} samples of {self.counts.seq_length:,} tokens to train on"]

    def training(self, share: BatchShare) -> CorpusBatches:
        return CorpusBatches(samples=self.corpus.train, seq_length=self.counts.seq_length, share=share)

    def validation(self, share: BatchShare) -> CorpusValidation | None:
        if self.corpus.valid is None:
            return None
        assert self.logging.eval_iters is not None
        full = replace(share, ramp=())
        return CorpusValidation(
            batches=CorpusBatches(samples=self.corpus.valid, seq_length=self.counts.seq_length, share=full),
            eval_iters=self.logging.eval_iters,
            eval_interval=self.logging.eval_interval,
        )


def read_corpus_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> CorpusData:
    """Checks all files and builds the indices of as many samples as the run takes.

    Raises UserError for a mistake in them and for sources that are too short.
    """
    iterations, batches = derived.train_iters(config.training), derived.batch_sizes(config, world_size)
    logging, seed = config.logging, config.training.seed
    valid = 0
    if logging.eval_iters is not None:
        valid = validation_samples(
            train_iters=iterations,
            eval_interval=logging.eval_interval,
            eval_iters=logging.eval_iters,
            global_batch_size=batches.full,
        )
    length = derived.sequence_length(config.training, shape)
    # As in Megatron the samples of a last step that is left out are among those that are shuffled.
    train = max(batches.samples_before(iterations), config.training.train_samples or 0)
    counts = SampleCounts(seq_length=length, train=train, valid=valid)
    if config.corpus.mock_data:
        return CorpusData(corpus=mock_corpus(tokenizer, counts, seed=seed), counts=counts, logging=logging)
    sources = data_sources("--data-path", config.corpus.data_path)
    corpus = read_corpus(sources, config.corpus.split, tokenizer, counts, seed=seed, vocab_size=shape.vocab_size)
    return CorpusData(corpus=corpus, counts=counts, logging=logging)
