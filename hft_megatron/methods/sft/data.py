"""The data of supervised fine-tuning: examples with the tokens of them that are trained."""

from dataclasses import dataclass

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.data.batches import BatchShare, ExampleBatches, RecordData
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.loading import training_data, validation_data
from hft_megatron.data.order import sample_stream
from hft_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SftData(RecordData[SftDataset]):
    """Examples, which have no numbers."""

    def batches(self, dataset: SftDataset, share: BatchShare, *, first: int) -> ExampleBatches:
        return ExampleBatches(dataset=dataset, pad_id=self.pad_id, share=share)


def read_sft_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, world_size: int) -> SftData:
    """Reads and tokenizes all sources; training data only where something is trained.

    Raises UserError for a source without files and for an error in them.
    """
    seq_length = derived.sequence_length(config.training, shape)
    train = samples = None
    if config.training.train_iters != 0:
        train = training_data(config.data, tokenizer, seq_length)
        assert train is not None, "validate() refuses a run without data"
        samples = sample_stream(train.order(config.training.seed), train.lengths - 1, train.seq_length, config.data)
    return SftData(
        train=train,
        valid=validation_data(config.data, tokenizer, seq_length),
        samples=samples,
        packed=config.data.packing,
        eval_iters=config.logging.eval_iters,
        pad_id=tokenizer.pad_id,
    )
