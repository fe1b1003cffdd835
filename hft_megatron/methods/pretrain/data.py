"""A corpus as the data of a run, and its micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hft_megatron.config import derived
from hft_megatron.config.data import data_sources
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.data.dataset import numbered
from hft_megatron.data.kept import folder_for_entries
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.methods.pretrain.datasets import (
    Corpus,
    CorpusSources,
    SampleCounts,
    SampleRules,
    Samples,
    mock_corpus,
    read_corpus,
)

FIELDS = ("tokens", "labels", "loss_mask")


@dataclass(frozen=True, kw_only=True)
class CorpusBatches:
    """Training batches: the samples in order; each is exactly ``seq_length``."""

    samples: Samples
    seq_length: int
    share: BatchShare
    end: int | None = None
    """The token that ends a document, where documents must not see each other; None where attention crosses them."""

    def step(self, consumed_samples: int) -> StepBatch:
        """The step after ``consumed_samples`` samples (over all ranks). Reads this rank's rows only, unless documents
        are apart: the cost of attention depends on their lengths in the whole global batch."""
        share = self.share.after(consumed_samples)
        size, batch = share.micro_batch_size, share.global_batch_size
        packed = self.end is not None
        squared_lengths = batch * self.seq_length**2
        if packed:
            rows = (self.samples[consumed_samples + row]["tokens"] for row in range(batch))
            squared_lengths = sum(int(self._segments(tokens).diff().square().sum()) for tokens in rows)
        return StepBatch(
            sequences=1 if packed else size,
            seq_length=size * self.seq_length if packed else self.seq_length,
            micro_batches=[self._micro_batch(consumed_samples + row) for row in share.micro_batch_starts()],
            tokens=batch * self.seq_length,
            squared_lengths=squared_lengths,
        )

    def _micro_batch(self, first: int) -> dict[str, torch.Tensor]:
        """The samples from ``first`` on; where documents are apart, laid end to end as the engine expects them."""
        rows = [self.samples[first + row] for row in range(self.share.micro_batch_size)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in FIELDS}
        if self.end is None:
            return stacked
        apart = {name: tensor.view(1, -1) for name, tensor in stacked.items()}
        return {**apart, "cu_seqlens": self._segments(stacked["tokens"]).int()}

    def _segments(self, tokens: torch.Tensor) -> torch.Tensor:
        """Starts of the documents of (..., seq_length) in the flat tokens, and the end: int64, (documents + 1,).

        As in Megatron an end token belongs to the document before it; every sample begins with a document of its own.
        """
        assert self.end is not None
        is_last = tokens.eq(self.end)
        is_last[..., -1] = True
        return torch.cat([torch.zeros(1, dtype=torch.int64), is_last.flatten().nonzero().flatten() + 1])

    def names(self, samples: Sequence[int]) -> str:
        """Numbers from 1 in megatron-core's order: its shuffle and blend decide what they hold."""
        return f"{numbered('sample', [sample + 1 for sample in samples])} of the run"


@dataclass(frozen=True, kw_only=True)
class CorpusValidation:
    """Validation batches: as in Megatron every validation continues where the last one stopped."""

    batches: CorpusBatches
    eval_iters: int
    eval_interval: int | None
    """Iterations between validations, which also run at the end; None: only at the end."""

    def steps(self, iteration: int) -> Iterator[StepBatch]:
        """``eval_iters`` steps, which follow from the number of validations before this one; that of --eval-on-start
        takes the steps of the one after it, so that the two differ by the weights alone."""
        before = 0 if self.eval_interval is None else max(0, iteration - 1) // self.eval_interval
        for step in range(before * self.eval_iters, (before + 1) * self.eval_iters):
            yield self.batches.step(step * self.batches.share.global_batch_size)


def validation_samples(*, train_iters: int, eval_interval: int | None, eval_iters: int, global_batch_size: int) -> int:
    """Samples of all validations of a run, by Megatron's formula: one at every interval, and one at the end."""
    validations = 1 if eval_interval is None else train_iters // eval_interval + 1
    return validations * eval_iters * global_batch_size


@dataclass(frozen=True, kw_only=True)
class CorpusData:
    """The ``RunData`` of a corpus."""

    corpus: Corpus
    counts: SampleCounts
    logging: LoggingConfig
    end: int | None
    """The ``end`` of ``CorpusBatches``."""
    uses_chat_template: bool = False
    samples: None = None
    """None, without epochs: all passes over a corpus are shuffled together."""

    @property
    def digest(self) -> str | None:
        return self.corpus.digest

    @property
    def valid_digests(self) -> dict[str, str]:
        """Empty: every validation takes --eval-iters steps, whatever is in the files."""
        return {}

    @property
    def order_digest(self) -> str | None:
        return self.corpus.order_digest

    def describe(self) -> list[str]:
        apart = [] if self.end is None else [f"documents see only themselves: each ends with the token {self.end}"]
        to_train = f"{self.counts.train:,} samples of {self.counts.seq_length:,} tokens to train on"
        return [*self.corpus.lines, *apart, *([to_train] if self.counts.train else [])]

    def training(self, share: BatchShare) -> CorpusBatches:
        assert self.corpus.train is not None
        return self._batches(self.corpus.train, share)

    def validation(self, share: BatchShare) -> dict[str, CorpusValidation]:
        """One stream, also of several sources: megatron-core draws the samples of a blend as one."""
        if self.corpus.valid is None:
            return {}
        assert self.logging.eval_iters is not None
        full = replace(share, ramp=())
        steps = CorpusValidation(
            batches=self._batches(self.corpus.valid, full),
            eval_iters=self.logging.eval_iters,
            # A single validation is the first, whatever run the weights are from.
            eval_interval=self.logging.eval_interval if self.counts.train else None,
        )
        return {"corpus": steps}

    def _batches(self, samples: Samples, share: BatchShare) -> CorpusBatches:
        return CorpusBatches(samples=samples, seq_length=self.counts.seq_length, share=share, end=self.end)


def read_corpus_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> CorpusData:
    """Checks all files and builds the indices of as many samples as the run takes.

    Raises UserError for an error in them and for sources that are too short.
    """
    batches = derived.batch_sizes(config, world_size)
    # A stage that is checked before its turn still has unresolved options.
    iterations = derived.train_iters(replace(config.training, global_batch_size=batches.full))
    logging, options = config.logging, config.corpus
    valid = 0
    if logging.eval_iters is not None:
        valid = validation_samples(
            train_iters=iterations,
            eval_interval=logging.eval_interval,
            eval_iters=logging.eval_iters,
            global_batch_size=batches.full,
        )
    length = derived.sequence_length(config.training, shape)
    # As in Megatron the samples of a last step that is left out are shuffled with the others.
    train = max(batches.samples_before(iterations), config.training.train_samples or 0)
    counts = SampleCounts(seq_length=length, train=train, valid=valid)
    flags = {"--reset-attention-mask": options.reset_attention_mask, "--eod-mask-loss": options.eod_mask_loss}
    folder = config.data.data_cache_path
    rules = SampleRules(
        seed=config.training.seed,
        eod_mask_loss=options.eod_mask_loss,
        needs_ends=next((flag for flag, is_on in flags.items() if is_on), None),
        kept_in=None if folder is None else folder_for_entries(Path(folder), "--data-cache-path"),
    )
    if options.mock_data:
        corpus = mock_corpus(tokenizer, counts, rules)
    else:
        corpus = read_corpus(_sources(config), tokenizer, counts, rules, vocab_size=shape.vocab_size)
    end = tokenizer.eos_id if options.reset_attention_mask else None
    return CorpusData(corpus=corpus, counts=counts, logging=logging, end=end)


def _sources(config: RunConfig) -> CorpusSources:
    """One blend, which --split divides, or one for training and one for validation."""
    if config.corpus.data_path:
        return CorpusSources(train=data_sources("--data-path", config.corpus.data_path), split=config.corpus.split)
    return CorpusSources(
        train=data_sources("--train-data-path", config.data.train_data_path),
        valid=data_sources("--valid-data-path", config.data.valid_data_path),
    )
