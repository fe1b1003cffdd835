"""``hft-megatron preprocess``: tokenizes data before training, into the same examples that a run would make.

Run: ``hft-megatron preprocess --input train.jsonl --output-prefix train --tokenizer-model MODEL``, and again after a
stop, to resume. ``hft-megatron sft --train-data-path train`` trains on the result, megatron-core's files.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.data import DataConfig, LongExamples
from hft_megatron.config.declared import check_bounds
from hft_megatron.config.names import DataFormat
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Input and output files."""

    input: tuple[str, ...] = ()
    """Input files, globs or TRACE task folders (.jsonl, .json, .csv, .tsv, .txt, each also with .gz or .zst, .parquet),
    read in this order. A .txt has one document per line."""
    output_prefix: str | None = None
    """Prefix of the output: PREFIX.bin and PREFIX.idx hold the tokens, PREFIX_loss_mask.* the trained ones,
    PREFIX_boundaries.* the ends of examples within documents, and PREFIX_preprocessed.json the options."""
    document_separator: str | None = None
    """Line that separates documents in a .txt, such as `<|endoftext|>`."""
    on_bad_line: Literal["stop", "skip"] = "stop"
    """Treatment of records that are damaged or make no example: stop with an error, or skip them and write them to
    PREFIX_bad_lines.jsonl."""
    workers: Annotated[int, Ge(1)] | None = None
    """Number of tokenizing processes; one per core when unset."""
    log_interval: Annotated[int, Ge(1)] = 10000
    """Documents between progress lines, without a terminal for a progress bar."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """Conversion of records to examples: options of a run, with the same meaning. The run must have the same values."""

    data_format: DataFormat | None = DataConfig.data_format
    """Layout of the records; recognised from the keys of a file's first record when unset."""
    data_keys: str | None = DataConfig.data_keys
    """Names for the keys of records, KEY=NAME,...: question=prompt,answer=completion reads `question` as `prompt`."""
    prompt_separator: str = DataConfig.prompt_separator
    """Text between a prompt and its completion, where these are separate texts; \\n is a line end."""
    ignore_keys: str | None = DataConfig.ignore_keys
    """Keys of records and messages to ignore, separated by commas."""
    chat_template: str | None = DataConfig.chat_template
    """Chat template: plain, tulu, llama2, llama3, chatml, or a jinja file; the tokenizer's own, or tulu if it has none,
    when unset."""
    loss_on: Literal["assistant", "all", "last"] = DataConfig.loss_on
    """Tokens that the loss is computed on: the assistant's turns (or the completion), everything, or the assistant's
    last turn."""
    train_on_eos: bool = DataConfig.train_on_eos
    """Train the token that ends each trained turn."""
    seq_length: Annotated[int, Ge(1)] | None = None
    """Longest example in tokens; no limit when unset."""
    long_examples: LongExamples = DataConfig.long_examples
    """Treatment of examples longer than --seq-length: stop with an error, drop them, truncate their end, or split them.
    PREFIX.bin has the whole document in any case."""
    append_eod: bool = False
    """Append the tokenizer's end token to documents of the format text; other formats always have it."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer of the data."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Kind of the tokenizer's files; recognised from the files when unset."""
    tokenizer_model: str | None = None
    """Hugging Face folder or SentencePiece .model file."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Options of ``hft-megatron preprocess``."""

    files: FilesConfig = field(default_factory=FilesConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)


def run(options: PreprocessOptions, status: StatusFolder) -> None:
    """Check the options, then make the data. Raises UserError for every mistake."""
    check_bounds(options)
    files, tokenizer, examples = options.files, options.tokenizer, options.examples
    for flag, value in (
        ("--input", files.input),
        ("--output-prefix", files.output_prefix),
        ("--tokenizer-model", tokenizer.tokenizer_model),
    ):
        if not value:
            raise UserError(f"{flag} is missing; see `hft-megatron preprocess --help` for its value.")
    assert files.output_prefix is not None
    assert tokenizer.tokenizer_model is not None
    # Imported here, because the checks above must not wait for them.
    from hft_megatron.data.chat import LossRule
    from hft_megatron.data.examples import NO_LIMIT, ExampleRules
    from hft_megatron.data.files.sources import TRAIN_SPLIT, find_input
    from hft_megatron.data.loading import record_rules
    from hft_megatron.data.preprocessed.making import Preprocessing, preprocess
    from hft_megatron.data.tokenizer_loading import load_tokenizer

    asked = Preprocessing(
        files=find_input("--input", files.input, TRAIN_SPLIT),
        prefix=files.output_prefix,
        rules=ExampleRules(
            seq_length=NO_LIMIT if examples.seq_length is None else examples.seq_length,
            long_examples=examples.long_examples,
            loss=LossRule(loss_on=examples.loss_on, train_on_eos=examples.train_on_eos),
            records=record_rules(examples),
        ),
        append_eod=examples.append_eod,
        document_separator=files.document_separator,
        skips_bad_lines=files.on_bad_line == "skip",
        workers=files.workers or len(os.sched_getaffinity(0)),
        log_interval=files.log_interval,
    )
    loaded = load_tokenizer(tokenizer.tokenizer_type, Path(tokenizer.tokenizer_model), examples.chat_template)
    for note in loaded.facts.notes:
        show(note)
    facts = preprocess(asked, loaded, show)
    for line in (facts.summary(files.output_prefix), *facts.counts.notes(files.output_prefix)):
        show(line)
