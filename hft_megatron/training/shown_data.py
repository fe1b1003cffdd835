"""``show-data``: the examples that a run would train on, without the run."""

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import DataConfig
from hft_megatron.data.fitting import NO_LIMIT
from hft_megatron.data.run_data import training_data, validation_data
from hft_megatron.data.shown_examples import ShownSource, shown_sources
from hft_megatron.data.tokenizer import check_tokenizer_fits
from hft_megatron.data.tokenizers import load_tokenizer


def read_shown_data(
    data: DataConfig, tokenizer_path: str, shape: ModelShape | None, seq_length: int | None, examples: int
) -> list[ShownSource]:
    """All sources, those of training first, each with its first ``examples``.

    ``shape`` is the model's where one is named: its vocabulary must hold the tokenizer's, and its positions are the
    limit unless ``seq_length`` is. Raises UserError for a mistake in tokenizer, template or data.
    """
    tokenizer = load_tokenizer(data.tokenizer_type, tokenizer_path, data.chat_template)
    limit = NO_LIMIT
    if shape is not None:
        check_tokenizer_fits(tokenizer, shape.vocab_size)
        limit = shape.max_position_embeddings
    if seq_length is not None:
        limit = seq_length
    read = training_data(data, tokenizer, limit), validation_data(data, tokenizer, limit)
    datasets = [dataset for dataset in read if dataset is not None]
    return [source for dataset in datasets for source in shown_sources(dataset, tokenizer, examples)]
