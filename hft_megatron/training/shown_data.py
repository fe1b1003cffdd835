"""``show-data``: the examples that a run would train on, without the run."""

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import DataConfig
from hft_megatron.data.files.sources import TRAIN_SPLIT, VALID_SPLIT, find_sources
from hft_megatron.data.sft import NO_LIMIT, example_rules, load_sft_dataset
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
    rules = example_rules(data, limit if seq_length is None else seq_length)
    shown: list[ShownSource] = []
    for option, words, split in (
        ("--train-data-path", data.train_data_path, TRAIN_SPLIT),
        ("--valid-data-path", data.valid_data_path, VALID_SPLIT),
    ):
        sources = find_sources(option, words, split)
        if sources:
            shown += shown_sources(load_sft_dataset(sources, tokenizer, rules), tokenizer, examples)
    return shown
