"""What pre-training gives a run: samples of a corpus, all of whose tokens are trained."""

from dataclasses import dataclass

from hft_megatron.config import derived
from hft_megatron.config.data_sources import data_sources
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import LoggingConfig, RunConfig
from hft_megatron.data.batches import BatchShare
from hft_megatron.data.corpus.batches import CorpusBatches, CorpusValidation, validation_samples
from hft_megatron.data.corpus.datasets import Corpus, SampleCounts, mock_corpus, read_corpus
from hft_megatron.data.tokenizer import Tokenizer


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
        return CorpusValidation(
            batches=CorpusBatches(samples=self.corpus.valid, seq_length=self.counts.seq_length, share=share),
            eval_iters=self.logging.eval_iters,
            eval_interval=self.logging.eval_interval,
        )


def read_corpus_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> CorpusData:
    """Checks all files and builds the indices of as many samples as the run takes.

    Raises UserError for a mistake in them and for sources that are too short.
    """
    iterations, batch = derived.train_iters(config.training), derived.global_batch_size(config, world_size)
    logging, seed = config.logging, config.training.seed
    valid = 0
    if logging.eval_iters is not None:
        valid = validation_samples(
            train_iters=iterations,
            eval_interval=logging.eval_interval,
            eval_iters=logging.eval_iters,
            global_batch_size=batch,
        )
    length = derived.sequence_length(config.training, shape)
    counts = SampleCounts(seq_length=length, train=iterations * batch, valid=valid)
    if config.corpus.mock_data:
        return CorpusData(corpus=mock_corpus(tokenizer, counts, seed=seed), counts=counts, logging=logging)
    sources = data_sources("--data-path", config.corpus.data_path)
    corpus = read_corpus(sources, config.corpus.split, tokenizer, counts, seed=seed, vocab_size=shape.vocab_size)
    return CorpusData(corpus=corpus, counts=counts, logging=logging)
