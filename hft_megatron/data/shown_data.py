"""``show-data``: the examples, or preference pairs, that a run would train on, without the run."""

from hft_megatron.config.data import DataConfig
from hft_megatron.config.dpo import BadPairs, check_pair_options
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.data.examples import NO_LIMIT
from hft_megatron.data.files.sources import TRAIN_SPLIT, VALID_SPLIT, find_sources, read_rows
from hft_megatron.data.loading import record_rules, training_data, training_pairs, validation_data, validation_pairs
from hft_megatron.data.records import RecordReader
from hft_megatron.data.shown_examples import ShownSource, shown_pairs, shown_sources
from hft_megatron.data.tokenizer import fit_tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer


def read_shown_data(
    data: DataConfig,
    tokenizer_path: str,
    shape: ModelShape | None,
    seq_length: int | None,
    examples: int,
    bad_pairs: BadPairs,
) -> tuple[tuple[str, ...], list[ShownSource]]:
    """Lines about the tokenizer, and all sources, those of training first, each with its first ``examples``, or pairs
    where the data are pairs.

    ``shape`` is the model's where one is named: its vocabulary must hold the tokenizer's, and its positions are the
    limit unless ``seq_length`` is. Raises UserError for a mistake in tokenizer, template or data.
    """
    tokenizer = load_tokenizer(data.tokenizer_type, tokenizer_path, data.chat_template)
    limit = NO_LIMIT
    if shape is not None:
        tokenizer = fit_tokenizer(tokenizer, shape.vocab_size)
        limit = shape.max_position_embeddings
    if seq_length is not None:
        limit = seq_length
    if _are_pairs(data):
        check_pair_options(data)
        pairs = training_pairs(data, tokenizer, limit, bad_pairs), validation_pairs(data, tokenizer, limit, bad_pairs)
        found = [source for each in pairs if each is not None for source in shown_pairs(each, tokenizer, examples)]
        return tokenizer.facts.notes, found
    read = training_data(data, tokenizer, limit), validation_data(data, tokenizer, limit)
    datasets = [dataset for dataset in read if dataset is not None]
    shown = [source for dataset in datasets for source in shown_sources(dataset, tokenizer, examples)]
    return tokenizer.facts.notes, shown


def _are_pairs(data: DataConfig) -> bool:
    """Whether --data-format or the first record says so; a run learns of pairs alone, or of none."""
    if data.data_format is not None:
        return data.data_format == "preference"
    sources = (
        *find_sources("--train-data-path", data.train_data_path, TRAIN_SPLIT),
        *find_sources("--valid-data-path", data.valid_data_path, VALID_SPLIT),
    )
    reader = RecordReader(record_rules(data))
    row = next((row for file in sources[0].files for row in read_rows(file)), None)
    return row is not None and reader.layout_of(row).format == "preference"
