"""What supervised fine-tuning gives a run: examples with the tokens of them that are trained."""

from dataclasses import dataclass

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.data.batches import BatchShare, SftBatches, SftValidation
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.loading import training_data, validation_data
from hft_megatron.data.order import SampleStream, sample_stream
from hft_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SftData:
    """The ``RunData`` of --train-data-path and --valid-data-path."""

    train: SftDataset
    valid: SftDataset | None
    samples: SampleStream
    """The training examples, or packs of them, in their order."""
    packed: bool
    eval_iters: int | None
    pad_id: int
    order_digest: None = None

    @property
    def digest(self) -> str:
        return self.train.digest

    @property
    def uses_chat_template(self) -> bool:
        return self.train.uses_chat_template

    def describe(self) -> list[str]:
        return [line for dataset in (self.train, self.valid) if dataset is not None for line in dataset.describe()]

    def training(self, share: BatchShare) -> SftBatches:
        return SftBatches(dataset=self.train, pad_id=self.pad_id, share=share, order=self.samples, packed=self.packed)

    def validation(self, share: BatchShare) -> SftValidation | None:
        if self.valid is None:
            return None
        return SftValidation(dataset=self.valid, pad_id=self.pad_id, share=share, limit=self.eval_iters)


def read_sft_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> SftData:
    """Reads and tokenizes all sources. Raises UserError for a source without files and for a mistake in them."""
    seq_length = derived.sequence_length(config.training, shape)
    train = training_data(config.data, tokenizer, seq_length)
    assert train is not None, "validate() refuses a run without data"
    return SftData(
        train=train,
        valid=validation_data(config.data, tokenizer, seq_length),
        samples=sample_stream(train.order(config.training.seed), train.lengths - 1, train.seq_length, config.data),
        packed=config.data.packing,
        eval_iters=config.logging.eval_iters,
        pad_id=tokenizer.pad_id,
    )
