"""What is trained on of an example that may be too long, and the account of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from hft_megatron.config.data_keys import DataKeys
from hft_megatron.config.schema import DataFormat, LongExamples
from hft_megatron.data.examples import Example
from hft_megatron.data.faults import RecordRefused
from hft_megatron.data.loss_rule import LossRule
from hft_megatron.data.records import RecordRules

NO_LIMIT = sys.maxsize
"""A sequence length for looking at data without a model."""
Span = tuple[int, int]
"""The first token of an example within its record, and the one behind its last."""


@dataclass(frozen=True, kw_only=True)
class ExampleRules:
    """What decides, next to the tokenizer and its template, which examples come of which records."""

    seq_length: int
    """Longest example, in positions."""
    long_examples: LongExamples = "error"
    loss: LossRule = field(default_factory=LossRule)
    data_format: DataFormat | None = None
    """That of all files; recognised file by file when None."""
    data_keys: DataKeys = ()
    prompt_separator: str = ""

    @property
    def records(self) -> RecordRules:
        """What decides which records come of which rows."""
        return RecordRules(data_format=self.data_format, keys=self.data_keys, separator=self.prompt_separator)


@dataclass(kw_only=True)
class SftCounts:
    """What became of the records of a source. Grows while they are read."""

    read: int = 0
    truncated: int = 0
    dropped: int = 0
    """Too long, or nothing trained left after truncation."""
    split: int = 0
    """Too long, and made into several examples."""
    lost_tokens: int = 0
    """Tokens that are not predicted because they were cut off, dropped, or in a part of a split example in which
    nothing is trained."""
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, example: Example, spans: Sequence[Span], rules: ExampleRules) -> None:
        """Count one more record, whose examples are ``spans``."""
        self.read += 1
        for start, stop in spans:
            self.tokens += stop - start
            self.trained_tokens += int(np.count_nonzero(example.trained[start + 1 : stop]))
        positions = len(example.ids) - 1
        if positions > rules.seq_length:
            self.dropped += not spans
            self.truncated += bool(spans) and rules.long_examples == "truncate"
            self.split += bool(spans) and rules.long_examples == "split"
            self.lost_tokens += positions - sum(stop - start - 1 for start, stop in spans)

    def merge(self, other: "SftCounts") -> None:
        """Count another part of the source."""
        for each in fields(SftCounts):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def check_predicts(example: Example) -> None:
    """Raise RecordRefused for an example of which nothing can be learned."""
    if not example.trained[1:].any():
        raise RecordRefused(example.place, "the example has no token to predict; give it a prompt or remove it.")


def spans_of(example: Example, rules: ExampleRules) -> list[Span]:
    """What is trained on of the example: all of it, and where it is too long what the rules say.

    A part of a split example begins with the token that the part before it predicted last, so that each token is
    predicted once. Raises RecordRefused for an example that is too long under ``error``.
    """
    size, length = len(example.ids), rules.seq_length
    if size - 1 <= length:
        return [(0, size)]
    if rules.long_examples == "error":
        raise RecordRefused(
            example.place,
            f"the example has {{}} positions, but --seq-length is {length}; choose --long-examples drop, truncate or "
            f"split, or raise it where the model has more positions.",
            size - 1,
        )
    starts = {"drop": range(0), "truncate": range(1), "split": range(0, size - 1, length)}[rules.long_examples]
    spans = [(start, min(start + length + 1, size)) for start in starts]
    return [(start, stop) for start, stop in spans if example.trained[start + 1 : stop].any()]
