"""``hft-megatron show-data``: shows the first examples of the data token by token, with the trained tokens marked.

Run: ``hft-megatron show-data --load-hf MODEL --train-data-path DATA``. It takes the data options of a run and needs no
weights, no GPU and no ranks.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.data import DataConfig, check_record_options
from hft_megatron.config.declared import check_bounds
from hft_megatron.config.dpo import BadPairs
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.run_folder import write_atomically
from hft_megatron.config.valid_sources import check_valid_sources
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ShownModelConfig:
    """Options of a run's model that its data depends on."""

    load_hf: str | None = None
    """Hugging Face folder, from which the tokenizer and the limits in config.json are read."""


@dataclass(frozen=True, kw_only=True)
class ShownTrainingConfig:
    """Training options of a run that its data depends on."""

    seq_length: Annotated[int, Ge(1)] | None = None
    """Longest example in tokens; the model's limit when unset, and no limit without --load-hf."""


@dataclass(frozen=True, kw_only=True)
class ShownPairsConfig:
    """Options of ``dpo`` that its pairs depend on."""

    dpo_bad_pairs: BadPairs = "error"
    """Treatment of preference pairs that nothing can be learned from: stop with an error, or skip and count them."""


@dataclass(frozen=True, kw_only=True)
class ShowDataOptions:
    """Options of ``hft-megatron show-data``."""

    config: str | None = None
    """YAML file of a run, from which only the options below are read; the command line overrides it."""
    examples: Annotated[int, Ge(0)] = 3
    """Number of examples, or pairs, to show from the beginning of each source."""
    html: str | None = None
    """HTML file for the examples, instead of text on the terminal."""
    model: ShownModelConfig = field(default_factory=ShownModelConfig)
    training: ShownTrainingConfig = field(default_factory=ShownTrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dpo: ShownPairsConfig = field(default_factory=ShownPairsConfig)


def run(options: ShowDataOptions, status: StatusFolder) -> None:
    """Read all data, as a run would, and show the first examples. Raises UserError for every mistake in it."""
    shape = _checked(options)
    # Imported here, because the checks above must not wait for them.
    from hft_megatron.data.shown_examples import read_shown_data
    from hft_megatron.report.shown_data import data_page, data_text, is_data_page

    if options.html is not None and not is_data_page(Path(options.html)):
        raise UserError(f"--html {options.html} already exists with other contents; choose another name, or remove it.")
    tokenizer = options.data.tokenizer_model or options.model.load_hf
    assert tokenizer is not None
    notes, sources = read_shown_data(
        options.data,
        tokenizer,
        shape,
        options.training.seq_length,
        options.examples,
        options.dpo.dpo_bad_pairs,
    )
    if options.html is None:
        show(_fit_for_output(data_text(sources, notes, colours=_colours_are_wanted())))
        return
    try:
        write_atomically(Path(options.html), data_page(sources, notes))
    except OSError as error:
        raise UserError(f"--html {options.html} cannot be written: {error.strerror}; choose another file.") from None
    show(f"{options.html}: {sum(len(source.examples) for source in sources)} examples")


def _checked(options: ShowDataOptions) -> ModelShape | None:
    """The model's shape, where a model is named."""
    check_bounds(options)
    if not options.data.train_data_path and not options.data.valid_data_path:
        raise UserError("--train-data-path is missing: name the data to show.")
    check_record_options(options.data)
    check_valid_sources(options.data)
    folder = options.model.load_hf
    if folder is None and options.data.tokenizer_model is None:
        raise UserError("--tokenizer-model is missing: name a tokenizer, or a model folder with --load-hf.")
    if folder is None:
        return None
    return ModelShape.from_hf_config(load_hf_config(folder), source=f"{folder}/{HF_CONFIG_FILE}")


def _colours_are_wanted() -> bool:
    """Return whether to use colours: on a terminal, unless its user turned them off (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _fit_for_output(text: str) -> str:
    """The text with characters that the output's encoding lacks as escapes: data may be in any script."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
