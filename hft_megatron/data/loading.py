"""The data sets that the data options of a run name."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from hft_megatron.config.data import DataConfig, data_keys, ignored_keys, prompt_separator
from hft_megatron.config.dpo import BadPairs
from hft_megatron.config.names import DataFormat
from hft_megatron.data.chat import LossRule
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.examples import ExampleRules
from hft_megatron.data.faults import check_use
from hft_megatron.data.files.sources import TRAIN_SPLIT, VALID_SPLIT, SourceFiles, find_sources
from hft_megatron.data.pairs import PairDataset, load_pair_dataset
from hft_megatron.data.records import RecordRules
from hft_megatron.data.sft import load_sft_dataset
from hft_megatron.data.token_cache import TokenCache, open_token_cache
from hft_megatron.data.tokenizer import Tokenizer


def training_data(data: DataConfig, tokenizer: Tokenizer, seq_length: int) -> SftDataset | None:
    """What --train-data-path names, None where it names nothing; ``seq_length`` is in positions.

    Raises UserError for a source without files and for a mistake in them.
    """
    return _load("--train-data-path", data, _load_examples(data, tokenizer, seq_length))


def validation_data(data: DataConfig, tokenizer: Tokenizer, seq_length: int) -> SftDataset | None:
    """What --valid-data-path names, by the same rules as the training data."""
    return _load("--valid-data-path", data, _load_examples(data, tokenizer, seq_length))


def training_pairs(data: DataConfig, tokenizer: Tokenizer, seq_length: int, bad_pairs: BadPairs) -> PairDataset | None:
    """The preference pairs that --train-data-path names, None where it names nothing."""
    return _load("--train-data-path", data, _load_pairs(data, tokenizer, seq_length, bad_pairs))


def validation_pairs(
    data: DataConfig, tokenizer: Tokenizer, seq_length: int, bad_pairs: BadPairs
) -> PairDataset | None:
    """The preference pairs that --valid-data-path names, by the same rules."""
    return _load("--valid-data-path", data, _load_pairs(data, tokenizer, seq_length, bad_pairs))


DatasetT = TypeVar("DatasetT", SftDataset, PairDataset)
_Loader = Callable[[Sequence[SourceFiles], TokenCache], DatasetT]


def _load_examples(data: DataConfig, tokenizer: Tokenizer, seq_length: int) -> _Loader[SftDataset]:
    return lambda sources, cache: load_sft_dataset(sources, tokenizer, _rules(data, seq_length), cache)


def _load_pairs(data: DataConfig, tokenizer: Tokenizer, seq_length: int, bad_pairs: BadPairs) -> _Loader[PairDataset]:
    return lambda sources, cache: load_pair_dataset(sources, tokenizer, _rules(data, seq_length), bad_pairs, cache)


def _load(option: str, data: DataConfig, load: _Loader[DatasetT]) -> DatasetT | None:
    is_train = option == "--train-data-path"
    words, split = (data.train_data_path, TRAIN_SPLIT) if is_train else (data.valid_data_path, VALID_SPLIT)
    sources = find_sources(option, words, split)
    if not sources:
        return None
    dataset = load(sources, open_token_cache(data.data_cache_path))
    # Validation data may do without what training has.
    if is_train or not data.train_data_path:
        check_use(data_keys(data.data_keys), prompt_separator(data.prompt_separator), dataset.uses, option)
    return dataset


def _rules(data: DataConfig, seq_length: int) -> ExampleRules:
    return ExampleRules(
        seq_length=seq_length,
        long_examples=data.long_examples,
        loss=LossRule(loss_on=data.loss_on, train_on_eos=data.train_on_eos),
        records=record_rules(data),
    )


class RecordOptions(Protocol):
    """The options that decide what a row means."""

    @property
    def data_format(self) -> DataFormat | None: ...
    @property
    def data_keys(self) -> str | None: ...
    @property
    def prompt_separator(self) -> str: ...
    @property
    def ignore_keys(self) -> str | None: ...


def record_rules(options: RecordOptions) -> RecordRules:
    """The rules that the words of the options stand for. Raises UserError for one that is none."""
    return RecordRules(
        data_format=options.data_format,
        data_keys=data_keys(options.data_keys),
        prompt_separator=prompt_separator(options.prompt_separator),
        ignore_keys=ignored_keys(options.ignore_keys),
    )
