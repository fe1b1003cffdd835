"""Options of the corpus that `pretrain` reads, their values, and their rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hft_megatron.config import derived
from hft_megatron.config.data import data_sources
from hft_megatron.config.declared import SAME_RUN
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Corpus to pre-train on."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin and .idx files, as tools/preprocess_data.py of Megatron writes them. A number before each is
    its weight: the share of training samples drawn from it. Several sources without weights are read once; a single
    source, or sources with weights, as often as the iterations need."""
    split: str = "969,30,1"
    """Shares of every source's documents, from its beginning, for training, validation and test; the test part is not
    used. megatron-core always splits --mock-data into thirds."""
    mock_data: bool = False
    """Train on megatron-core's synthetic documents of counting numbers instead of --data-path, to try out a run."""
    reset_attention_mask: Annotated[bool, SAME_RUN] = False
    """Restrict attention to one document, as if each stood alone: the documents of a sample end with the tokenizer's
    end token. Without it attention crosses their ends."""
    reset_position_ids: bool = False
    """Count positions from 0 in each document; needs --reset-attention-mask. Rotary positions enter only as differences
    within a document, so this changes no result."""
    eod_mask_loss: Annotated[bool, SAME_RUN] = False
    """Leave the token after an end token out of the loss: the first token of a document that follows another one."""


def split_parts(split: str) -> tuple[float, float, float]:
    """The parts of --split for training, validation and test, in proportion; omitted parts are 0.

    Raises UserError for anything but one to three numbers, and where nothing is left to train on.
    """
    words = split.split(",")
    # megatron-core takes what looks like a number out of any text: of 9e1,1 it would make 9, 1 and 1.
    if len(words) > 3 or not all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", word) for word in words):
        raise UserError(f"--split {split}: must be one to three numbers separated by commas, such as 969,30,1.")
    train, valid, test = [*(float(word) for word in words), 0.0, 0.0][:3]
    if train == 0:
        raise UserError(f"--split {split} leaves nothing to train on; its first number must be above 0.")
    return train, valid, test


def corpus_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Training needs tokens, from files or made up."""
    corpus, data = config.corpus, config.data
    sources = {"--data-path": corpus.data_path, "--train-data-path": data.train_data_path}
    given = ["--mock-data"] * corpus.mock_data
    given += [f"{option} {' '.join(words)}" for option, words in sources.items() if words]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} are both given; keep one of them.")
    if data.train_data_path and corpus.split != CorpusConfig.split:
        raise UserError(f"--split {corpus.split} splits --data-path, not --train-data-path; leave one of them out.")
    if data.valid_data_path and not data.train_data_path and not derived.only_validates(config):
        raise UserError(
            f"--valid-data-path {' '.join(data.valid_data_path)} needs --train-data-path; give both, or leave it out "
            f"and let --split divide --data-path."
        )
    if config.training.train_iters != 0 and not given:
        raise UserError(
            "--data-path is missing: give the prefix of .bin and .idx files, --mock-data to try a run out, or "
            "--train-iters 0 to train nothing."
        )


def corpus_words_are_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Weights stand before prefixes, for all or none, and --split has parts."""
    data_sources("--data-path", config.corpus.data_path)
    data_sources("--train-data-path", config.data.train_data_path)
    data_sources("--valid-data-path", config.data.valid_data_path)
    split_parts(config.corpus.split)


def positions_restart_with_attention(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse positions that restart where attention does not: two documents would share positions."""
    if config.corpus.reset_position_ids and not config.corpus.reset_attention_mask:
        raise UserError(
            "--reset-position-ids needs --reset-attention-mask: rotary positions restart only where documents don't "
            "see each other; add it, or leave --reset-position-ids out."
        )


def length_is_in_iterations(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """megatron-core shuffles the samples of all passes over a corpus together, so that no epoch begins anywhere."""
    if config.training.train_epochs is not None:
        raise UserError(
            f"--train-epochs {config.training.train_epochs}: a corpus is shuffled over all passes at once and has no "
            f"epochs; give --train-iters."
        )
    if config.hft.hft_round_interval == "epoch":
        raise UserError(
            "--hft-round-interval epoch: a corpus is shuffled over all passes at once and has no epochs; give the "
            "iterations of a round, such as --hft-round-interval 50."
        )


def validation_has_a_length(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A corpus is too large to validate on all of it, and a part of it must be kept back for that."""
    logging, split, data = config.logging, config.corpus.split, config.data
    if data.valid_data_path and logging.eval_iters is None:
        raise UserError(
            f"--valid-data-path {' '.join(data.valid_data_path)} needs --eval-iters; add it, or leave it out."
        )
    if logging.eval_interval is not None and logging.eval_iters is None:
        raise UserError(f"--eval-interval {logging.eval_interval} needs --eval-iters; add it, or leave it out.")
    if logging.eval_on_start and logging.eval_iters is None and logging.eval_tasks is None:
        raise UserError("--eval-on-start needs --eval-iters; add it, or leave it out.")
    if config.corpus.mock_data:
        return
    if data.train_data_path:
        if logging.eval_iters is not None and not data.valid_data_path:
            raise UserError(
                f"--eval-iters {logging.eval_iters} needs --valid-data-path beside --train-data-path; add it, or leave "
                f"--eval-iters out."
            )
        return
    if logging.eval_iters is not None and split_parts(split)[1] == 0:
        raise UserError(
            f"--eval-iters {logging.eval_iters} needs a part for validation, but --split {split} has none; make its "
            f"second number larger than 0, or leave --eval-iters out."
        )


def samples_divide_over_the_ranks(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Samples are exactly as long as --seq-length, and sequence parallelism cuts them into equal parts."""
    length, size = derived.sequence_length(config.training, shape), config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and length % size:
        raise UserError(
            f"--seq-length {length} is not a multiple of --tensor-model-parallel-size {size}, as --sequence-parallel "
            f"needs; the nearest length that fits is {length - length % size or size}."
        )


CORPUS_RULES = (
    corpus_is_given,
    corpus_words_are_clear,
    positions_restart_with_attention,
    length_is_in_iterations,
    validation_has_a_length,
    samples_divide_over_the_ranks,
)
