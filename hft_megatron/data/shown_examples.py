"""``show-data``: the first examples, or preference pairs, that a run would train on, for people to inspect."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.data import DataConfig
from hft_megatron.config.dpo import BadPairs
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.valid_sources import check_pair_sources, valid_sources
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.examples import NO_LIMIT
from hft_megatron.data.files.sources import TRAIN_SPLIT, find_sources, find_valid_source, read_rows
from hft_megatron.data.loading import record_rules, training_data, training_pairs, validation_data, validation_pairs
from hft_megatron.data.pairs import PairDataset
from hft_megatron.data.record_errors import printable
from hft_megatron.data.records import RecordReader
from hft_megatron.data.tokenizer import Encoded, Tokenizer, fit_tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer

_MOST_BYTES = 4
"""Largest number of bytes of one character in UTF-8."""
_HALF = "\ufffd"
"""A decoder's output for bytes that are not a whole character."""


@dataclass(frozen=True, kw_only=True)
class VisibleToken:
    """One token, or the few that only together make a character."""

    text: str
    """Line ends and tabs unchanged; other characters that don't print as escapes. A special token's name."""
    ids: tuple[int, ...]
    trained: bool
    """True if it is in the loss; never for the first token of an example, which nothing predicts."""
    special: bool


def visible_tokens(tokenizer: Tokenizer, ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> list[VisibleToken]:
    """An example's tokens (ids and trained, both of shape (tokens,)) in order, none left out."""
    names = {token.id: token.content for token in tokenizer.facts.special_tokens}
    asked = [False, *trained[1:].tolist()]
    shown: list[VisibleToken] = []
    for (special, is_trained), run in groupby(
        zip(ids.tolist(), asked, strict=True), key=lambda pair: (pair[0] in names, pair[1])
    ):
        run_ids = [token for token, _ in run]
        begins = not shown or shown[-1].special
        named: Sequence[tuple[str, tuple[int, ...]]] = [(names.get(token, ""), (token,)) for token in run_ids]
        parts = named if special else _texts(tokenizer, run_ids, begins=begins)
        shown += [
            VisibleToken(text=printable(text, keep="\n\t"), ids=part, trained=is_trained, special=special)
            for text, part in parts
        ]
    return shown


def _texts(tokenizer: Tokenizer, ids: Sequence[int], *, begins: bool) -> Sequence[tuple[str, tuple[int, ...]]]:
    """Each token's text; tokens are joined until they make whole characters.

    A decoder removes the word-start mark from its first token, which is right only where a text ``begins``.
    """
    anchor = tokenizer.encode_batch(["a"], continues=True)[0]
    anchored = len(tokenizer.decode(anchor))
    texts: list[tuple[str, tuple[int, ...]]] = []
    position = 0
    while position < len(ids):
        first = begins and position == 0
        for size in range(1, _MOST_BYTES + 1):
            part = ids[position : position + size]
            text = tokenizer.decode(part) if first else tokenizer.decode([*anchor, *part])[anchored:]
            if not text.endswith(_HALF) or position + size >= len(ids):
                break
        texts.append((text, tuple(part)))
        position += len(part)
    return texts


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """One example, or one answer of a pair after its prompt, whole."""

    name: str
    """Name with its number, from 1, among the kept examples of its source."""
    tokens: tuple[VisibleToken, ...]

    @property
    def title(self) -> str:
        """The name with counts."""
        count = sum(len(token.ids) for token in self.tokens)
        trained = sum(len(token.ids) for token in self.tokens if token.trained)
        return f"{self.name}: {count} tokens, {trained} trained"


@dataclass(frozen=True, kw_only=True)
class ShownSource:
    """One source's account, and its first examples."""

    account: tuple[str, ...]
    """Lines about it."""
    examples: tuple[ShownExample, ...]


def shown_sources(dataset: SftDataset, tokenizer: Tokenizer, examples: int) -> list[ShownSource]:
    """Every source of ``dataset`` with its first ``examples``."""
    shown, start = [], 0
    for part, account in zip(dataset.parts, dataset.accounts(), strict=True):
        found = tuple(
            _shown(f"example {number + 1}", dataset.example(start + number), tokenizer)
            for number in range(min(examples, part.examples))
        )
        shown.append(ShownSource(account=tuple(account), examples=found))
        start += part.examples
    return shown


def shown_pairs(dataset: PairDataset, tokenizer: Tokenizer, pairs: int) -> list[ShownSource]:
    """Every source of ``dataset`` with the two answers of its first ``pairs``, the chosen one first."""
    shown, start = [], 0
    for part, account in zip(dataset.sources, dataset.accounts(), strict=True):
        found = tuple(
            _shown(f"pair {number + 1}, {name}", dataset.answers.example(2 * (start + number) + half), tokenizer)
            for number in range(min(pairs, part.pairs))
            for half, name in enumerate(("chosen", "rejected"))
        )
        shown.append(ShownSource(account=tuple(account), examples=found))
        start += part.pairs
    return shown


def _shown(name: str, example: Encoded, tokenizer: Tokenizer) -> ShownExample:
    return ShownExample(name=name, tokens=tuple(visible_tokens(tokenizer, *example)))


def read_shown_data(
    data: DataConfig,
    tokenizer_path: str,
    shape: ModelShape | None,
    seq_length: int | None,
    examples: int,
    bad_pairs: BadPairs,
) -> tuple[tuple[str, ...], list[ShownSource]]:
    """Lines about the tokenizer, and all sources, training first, each with its first ``examples``, or pairs where the
    data are pairs.

    ``shape`` is the model's, if one is named: its vocabulary must hold the tokenizer's, and its positions are the limit
    unless ``seq_length`` is. Raises UserError for an error in tokenizer, template or data.
    """
    tokenizer = load_tokenizer(data.tokenizer_type, tokenizer_path, data.chat_template)
    limit = NO_LIMIT
    if shape is not None:
        tokenizer = fit_tokenizer(tokenizer, shape.vocab_size)
        limit = shape.max_position_embeddings
    if seq_length is not None:
        limit = seq_length
    if _are_pairs(data):
        check_pair_sources(data)
        train = training_pairs(data, tokenizer, limit, bad_pairs)
        pairs = [train, *validation_pairs(data, tokenizer, limit, bad_pairs).values()]
        found = [source for each in pairs if each is not None for source in shown_pairs(each, tokenizer, examples)]
        return tokenizer.facts.notes, found
    read = [training_data(data, tokenizer, limit), *validation_data(data, tokenizer, limit).values()]
    datasets = [dataset for dataset in read if dataset is not None]
    shown = [source for dataset in datasets for source in shown_sources(dataset, tokenizer, examples)]
    return tokenizer.facts.notes, shown


def _are_pairs(data: DataConfig) -> bool:
    """True if --data-format or the first record says so; a run learns from pairs only, or from none."""
    sources = find_sources("--train-data-path", data.train_data_path, TRAIN_SPLIT)
    options = data
    if not sources:
        first = valid_sources(data)[0]
        sources, options = (find_valid_source(first),), first.data
    if options.data_format is not None:
        return options.data_format == "preference"
    reader = RecordReader(record_rules(options))
    row = next((row for file in sources[0].files for row in read_rows(file)), None)
    return row is not None and reader.layout_of(row).format == "preference"
