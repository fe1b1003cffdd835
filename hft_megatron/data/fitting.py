"""What is trained on of an example that may be too long, and the account of it."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from hft_megatron.config.data import LongExamples
from hft_megatron.data.chat import LossRule
from hft_megatron.data.examples import Example
from hft_megatron.data.faults import RecordRefused, printable
from hft_megatron.data.records import RecordRules
from hft_megatron.errors import UserError

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
    records: RecordRules = field(default_factory=RecordRules)


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
    answers: int = 0
    empty_answers: int = 0
    """Those of which nothing but the end token is trained."""
    untrained_turns: int = 0
    """Turns of the assistant that their records take out of what is learned."""
    repeated_prompts: int = 0
    """Records whose completion repeated the prompt, where it was taken off."""
    conversations: int = 0
    """Records that the chat template rendered."""
    token_names: int = 0
    """Records of verbatim texts that have names of special tokens in them."""
    unread: dict[str, int] = field(default_factory=dict)
    """Records with each of the keys that nothing was made of."""
    ignored: dict[str, int] = field(default_factory=dict)
    """The same for keys of --ignore-keys."""

    def add(self, example: Example, spans: Sequence[Span], rules: ExampleRules) -> None:
        """Count one more record, whose examples are ``spans``."""
        self.read += 1
        self.answers += example.answers
        self.empty_answers += example.empty_answers
        self.untrained_turns += example.untrained_turns
        self.repeated_prompts += example.repeated_prompt
        self.conversations += example.is_conversation
        self.token_names += example.has_token_names
        count_keys(self.unread, example.keys.unread)
        count_keys(self.ignored, example.keys.ignored)
        for start, stop in spans:
            self.tokens += stop - start
            self.trained_tokens += int(np.count_nonzero(example.trained[start + 1 : stop]))
        positions = len(example.ids) - 1
        if positions > rules.seq_length:
            self.dropped += not spans
            self.truncated += bool(spans) and rules.long_examples == "truncate"
            self.split += bool(spans) and rules.long_examples == "split"
            self.lost_tokens += positions - sum(stop - start - 1 for start, stop in spans)

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "SftCounts":
        """The inverse of ``asdict``. In counts of earlier versions every record passes for a conversation."""
        return SftCounts(**{"conversations": saved["read"], **saved})

    def merge(self, other: "SftCounts") -> None:
        """Count another part of the source."""
        for each in fields(SftCounts):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, each.name, mine + theirs)

    def notes(self, path: str) -> list[str]:
        """Lines for the log about the source ``path``: what its records have, and is not learned."""
        lines = []
        if self.untrained_turns:
            lines.append(f"{path}: turns not trained, by a key of their own: {self.untrained_turns:,}")
        if self.repeated_prompts:
            lines.append(
                f"{path}: prompts that their completions repeated, which were taken off them: {self.repeated_prompts:,}"
            )
        if self.empty_answers:
            lines.append(
                f"{path}: {self.empty_answers:,} of {self.answers:,} answers are empty: only their end token is trained"
            )
        return lines + notes_of_token_names(path, self.token_names) + notes_of_keys(path, self.unread, self.ignored)

    def check_answers(self, path: str) -> None:
        """Raise UserError where every answer of the source ``path`` is empty."""
        if 0 < self.answers == self.empty_answers:
            raise UserError(
                f"{path}: all {self.answers:,} answers are empty, so that nothing but end tokens would be learned; "
                f"look for the key that has their text, or leave {path} out."
            )


def count_keys(counts: dict[str, int], keys: Iterable[str]) -> None:
    """Count one more record with these keys."""
    for key in keys:
        counts[key] = counts.get(key, 0) + 1


def notes_of_token_names(path: str, count: int) -> list[str]:
    """A line for the log about records of verbatim texts that a template may have rendered; none where there are none.

    Without it such data would be trained to the end with turns that no generation has.
    """
    if not count:
        return []
    return [
        f"{path}: records with names of special tokens in their texts, where these are ordinary characters: {count:,}; "
        f"give conversations as messages, which the chat template renders"
    ]


def notes_of_keys(path: str, unread: Mapping[str, int], ignored: Mapping[str, int]) -> list[str]:
    """Lines for the log: the keys of records and messages that nothing is made of, and in how many records."""
    return [
        f"{path}: {what}: {', '.join(f'{printable(key)} ({count:,})' for key, count in counts.items())}"
        for what, counts in (("keys that are not read", unread), ("keys passed over by --ignore-keys", ignored))
        if counts
    ]


def check_predicts(example: Example) -> None:
    """Raise RecordRefused for an example of which nothing can be learned."""
    if example.trained[1:].any():
        return
    if example.untrained_turns:
        raise RecordRefused(
            example.place,
            "the example has no token to predict, because its messages say that none of the answers is to be trained; "
            "correct them, or remove it.",
        )
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
