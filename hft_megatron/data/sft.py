"""The examples of supervised fine-tuning: token ids and which of them are trained, for all sources of a run.

The model sees ``tokens[:-1]`` of an example and predicts ``tokens[1:]``, so an example of L tokens has L-1 positions,
and that number is what the sequence length limits.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.schema import DataFormat, LongExamples
from hft_megatron.data.examples import Example, read_examples
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.loss_rule import LossRule
from hft_megatron.data.order import MixtureOrder, Order, SampleOrder, shares_of_epoch
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError

NO_LIMIT = sys.maxsize
"""A sequence length for looking at data without a model."""
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class ExampleRules:
    """What decides, next to the tokenizer and its template, which examples come of which records."""

    seq_length: int
    """Longest example, in positions."""
    long_examples: LongExamples = "error"
    loss: LossRule = field(default_factory=LossRule)
    data_format: DataFormat | None = None
    """That of all files; recognised file by file when None."""


@dataclass(frozen=True, kw_only=True)
class SftCounts:
    """What became of the records of a source."""

    read: int
    truncated: int
    dropped: int
    """Too long, or nothing trained left after truncation."""
    split: int
    """Too long, and made into several examples."""
    lost_tokens: int
    """Tokens that are not predicted because they were cut off, dropped, or in a part of a split example in which
    nothing is trained."""
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """The examples of one source: a range of the data set's."""

    path: str
    weight: float | None
    formats: tuple[DataFormat, ...]
    """Those of its files."""
    examples: int
    counts: SftCounts

    def summary(self) -> str:
        """One line for the log, with everything that was shortened or left out."""
        counts = self.counts
        lost = f" with {counts.lost_tokens} tokens lost" if counts.lost_tokens else ""
        split = f", {counts.split} split" if counts.split else ""
        return (
            f"{self.path} ({', '.join(self.formats)}): {self.examples} examples of {counts.read} records, "
            f"{counts.trained_tokens} trained tokens of {counts.tokens}, {counts.truncated} truncated and "
            f"{counts.dropped} dropped{lost}{split}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SftDataset:
    """All examples, source after source, end to end in two flat arrays."""

    parts: tuple[SourcePart, ...]
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``; shape (examples + 1,)."""
    seq_length: int
    digest: str
    """sha256 over files, weights, template, tokenizer and rules: equal digests mean equal examples in equal order."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> Encoded:
        """Token ids and trained mask of one example, both of shape (tokens,)."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.trained[span]

    def num_positions(self, index: int) -> int:
        """Predicted positions of one example: its tokens less one."""
        return int(self.offsets[index + 1] - self.offsets[index]) - 1

    def order(self, seed: int) -> Order:
        """Which example comes when in training: each once in an epoch, or each source by its weight."""
        shares = self.epoch_shares()
        if shares is None:
            return SampleOrder(num_examples=len(self), seed=seed)
        sizes = tuple(part.examples for part in self.parts)
        return MixtureOrder(num_examples=len(self), seed=seed, sizes=sizes, shares=shares)

    def describe(self) -> list[str]:
        """Lines for the log: each source, what it has in an epoch where weights say so, and the whole."""
        lines = []
        for part, share in zip(self.parts, self.epoch_shares() or (None,) * len(self.parts), strict=True):
            mixed = (
                "" if share is None else f"; {share} samples of it in an epoch of {len(self)} (weight {part.weight:g})"
            )
            limit = "" if self.seq_length == NO_LIMIT else f" (sequence length {self.seq_length})"
            lines.append(f"{part.summary()}{limit}{mixed}")
        return lines

    def epoch_shares(self) -> tuple[int, ...] | None:
        """Samples of each source in an epoch, None where sources have no weights."""
        weights = [part.weight for part in self.parts if part.weight is not None]
        return shares_of_epoch([part.examples for part in self.parts], weights) if weights else None


def load_sft_dataset(sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules) -> SftDataset:
    """Read and tokenize all sources.

    Needs no model and no process group. Raises UserError naming the place of a record that is malformed, can't be
    rendered, or is too long under ``error``, and for a source without examples or with too small a weight.
    """
    kept: list[Encoded] = []
    parts = []
    for source in sources:
        examples, part = _load_source(source, tokenizer, rules)
        kept += examples
        parts.append(part)
    dataset = SftDataset(
        parts=tuple(parts),
        tokens=np.concatenate([ids for ids, _ in kept]),
        trained=np.concatenate([mask for _, mask in kept]),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in kept])]).astype(np.int64),
        seq_length=rules.seq_length,
        digest=data_digest(sources, tokenizer, rules),
    )
    for part, share in zip(parts, dataset.epoch_shares() or (1,) * len(parts), strict=True):
        if share == 0:
            raise UserError(
                f"the weight {part.weight:g} of {part.path} gives it no sample in an epoch of {len(dataset)}; raise "
                f"it, or leave the source out."
            )
    return dataset


def _load_source(source: SourceFiles, tokenizer: Tokenizer, rules: ExampleRules) -> tuple[list[Encoded], SourcePart]:
    kept: list[Encoded] = []
    formats: set[DataFormat] = set()
    read = truncated = dropped = split = lost_tokens = 0
    for example in read_examples(source, tokenizer, rules.loss, rules.data_format):
        read += 1
        formats.add(example.format)
        fitting = _fitting(example, rules)
        kept += fitting
        if len(example.ids) - 1 > rules.seq_length:
            dropped += not fitting
            truncated += bool(fitting) and rules.long_examples == "truncate"
            split += bool(fitting) and rules.long_examples == "split"
            lost_tokens += len(example.ids) - 1 - sum(len(ids) - 1 for ids, _ in fitting)
    if not kept:
        reason = f"all {dropped} were longer than --seq-length {rules.seq_length}" if dropped else "it is empty"
        raise UserError(f"the data file {source.path} holds no example to train on: {reason}.")
    counts = SftCounts(
        read=read,
        truncated=truncated,
        dropped=dropped,
        split=split,
        lost_tokens=lost_tokens,
        tokens=sum(len(ids) for ids, _ in kept),
        trained_tokens=sum(int(mask[1:].sum()) for _, mask in kept),
    )
    known = tuple(sorted(formats))
    return kept, SourcePart(path=source.path, weight=source.weight, formats=known, examples=len(kept), counts=counts)


def _fitting(example: Example, rules: ExampleRules) -> list[Encoded]:
    """What is trained on of the example: all of it, and where it is too long what the rules say.

    A part of a split example begins with the token that the part before it predicted last, so that each token is
    predicted once.
    """
    ids, mask, length = example.ids, example.trained, rules.seq_length
    if len(ids) - 1 <= length:
        if not mask[1:].any():
            raise UserError(f"{example.place}: the example has no token to predict; give it a prompt or remove it.")
        return [(ids, mask)]
    if rules.long_examples == "error":
        raise UserError(
            f"{example.place}: the example has {len(ids) - 1} positions, but --seq-length is {length}; raise it or "
            f"choose --long-examples drop, truncate or split."
        )
    starts = {"drop": range(0), "truncate": range(1), "split": range(0, len(ids) - 1, length)}[rules.long_examples]
    parts = [(ids[start : start + length + 1], mask[start : start + length + 1]) for start in starts]
    return [(ids, mask) for ids, mask in parts if mask[1:].any()]


def data_digest(sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, *others: str) -> str:
    """sha256 (hex) over all that decides the examples; ``others`` are rules that not every method has."""
    facts = tokenizer.facts
    decisive = {
        "sources": [
            {"weight": source.weight, "files": [_file_digest(file) for file in source.files]} for source in sources
        ],
        "tokenizer": [facts.identity, facts.chat_template, dict(facts.template_variables)],
        "rules": asdict(rules) | ({"others": others} if others else {}),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
