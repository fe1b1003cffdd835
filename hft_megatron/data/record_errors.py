"""Reports about records: errors with file and line, and counts of what was done with them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hft_megatron.config.data import DataKeys
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RecordUse:
    """Account of one source."""

    keys: DataKeys = ()
    """Mapped keys that at least one record had."""
    separator: str = ""
    """The separator; empty where no record has it."""

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "RecordUse":
        """The inverse of ``asdict``, of JSON."""
        return RecordUse(keys=tuple((key, known) for key, known in saved["keys"]), separator=saved["separator"])

    def merged(self, other: "RecordUse") -> "RecordUse":
        """The account together with that of another part of the same source."""
        return RecordUse(keys=tuple(sorted({*self.keys, *other.keys})), separator=self.separator or other.separator)

    def words(self) -> str:
        """Words for the log, after a format; empty where nothing was done."""
        mapped = "".join(f", `{key}` as `{known}`" for key, known in self.keys)
        return mapped + (f", {self.separator!r} between prompt and answer" if self.separator else "")


def check_use(keys: DataKeys, separator: str, uses: Sequence[RecordUse], option: str) -> None:
    """Raise UserError for a mapped key that no record has, and for a separator that no record can use."""
    found = {key for use in uses for key, _ in use.keys}
    for key, known in keys:
        if key not in found:
            raise UserError(f"--data-keys {key}={known}: no record of {option} has the key `{key}`; correct it.")
    if separator and not any(use.separator for use in uses):
        raise UserError(
            f"--prompt-separator {separator!r} goes between a prompt and an answer that are texts, but no record of "
            f"{option} has both; leave it out."
        )


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with every character that doesn't print, other than those in ``keep``, as its escape (``\\x1b``).

    Data may hold codes that clear a terminal, or that turn the direction of what follows them.
    """
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def notes_of_token_names(path: str, count: int) -> list[str]:
    """A line for the log about verbatim texts that a template may have rendered; none where there are none.

    Such data would otherwise silently be trained on turns that generation never has.
    """
    if not count:
        return []
    return [
        f"{path}: records with names of special tokens in their texts, where they are ordinary characters: {count:,}; "
        f"give conversations as messages, which the chat template renders"
    ]


def notes_of_keys(path: str, unread: Mapping[str, int], ignored: Mapping[str, int]) -> list[str]:
    """Lines for the log: the keys of records and messages that are not read, with their numbers of records."""
    return [
        f"{path}: {what}: {', '.join(f'{printable(key)} ({count:,})' for key, count in counts.items())}"
        for what, counts in (("keys that are not read", unread), ("keys ignored by --ignore-keys", ignored))
        if counts
    ]


_MOST_KINDS, _TOLD_KINDS = 100, 8
"""Numbers of kinds that are counted apart, which bounds the memory, and reported, the most frequent first."""


class RecordRefused(UserError):
    """A record from which nothing can be learned under the given options."""

    def __init__(self, place: str, sentence: str, size: int | None = None) -> None:
        """``size`` replaces ``{}`` in the sentence, so that records that differ only in it share one error."""
        super().__init__(f"{place}: {_with_size(sentence, size)}")
        self.sentence = sentence
        self.size = size


@dataclass(kw_only=True)
class _Kind:
    sentence: str
    """Sentence about the first record."""
    size: int | None
    """The largest size."""
    records: int = 0
    places: list[str] = field(default_factory=list)
    """Places of the first two records."""
    differ: bool = False
    """True if the sentences of other records have other numbers."""

    def told(self) -> str:
        if self.records == 1:
            return f"{self.places[0]}: {_with_size(self.sentence, self.size)}"
        more = ", ..." if self.records > 2 else ""
        first = ", of which the first" if self.differ else ""
        size = "" if self.size is None else f"up to {self.size}"
        text = self.sentence.replace("{}", size, 1) if size else self.sentence
        return f"{self.records:,} records ({', '.join(self.places)}{more}){first}: {text}"


class RecordErrors:
    """Errors of records, collected while they are read."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._others = 0

    def __len__(self) -> int:
        """Number of records with an error."""
        return sum(kind.records for kind in self._kinds.values()) + self._others

    def add(self, place: str, error: UserError) -> None:
        """Count the error of the record at ``place``."""
        sentence, size = str(error).removeprefix(f"{place}: "), None
        if isinstance(error, RecordRefused):
            sentence, size = error.sentence, error.size
        name = re.sub(r"\d+", "0", sentence)
        if name not in self._kinds and len(self._kinds) == _MOST_KINDS:
            self._others += 1
            return
        kind = self._kinds.setdefault(name, _Kind(sentence=sentence, size=size))
        kind.records += 1
        kind.differ |= sentence != kind.sentence
        if size is not None and kind.size is not None:
            kind.size = max(kind.size, size)
        if len(kind.places) < 2:
            kind.places.append(place)

    def told(self) -> str:
        """A sentence for every kind of error, the most frequent first; empty without any."""
        kinds = sorted(self._kinds.values(), key=lambda kind: -kind.records)
        sentences = [kind.told() for kind in kinds[:_TOLD_KINDS]]
        others = len(self) - sum(kind.records for kind in kinds[:_TOLD_KINDS])
        return " ".join(sentences + [f"{others:,} records have other errors."] * (others > 0))

    def raise_if_any(self) -> None:
        """Raise UserError with all errors."""
        if self._kinds:
            raise UserError(self.told())


def _with_size(sentence: str, size: int | None) -> str:
    return sentence if size is None else sentence.replace("{}", str(size), 1)
