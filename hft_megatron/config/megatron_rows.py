"""Rows of the table of Megatron-LM's flags and of other trainers' names, and short ways to write them."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hft_megatron.config.given import ANY_RUN, LEAVE, Given

Kind = Literal["switch", "value", "several"]
State = Literal["accepted", "refused", "not built yet", "other name"]
Conversion = Callable[[str, Given], str]
"""Explanation for one value, without a full stop, by the value, empty where there is none, and the command."""
VALUE = "VALUE"
"""Placeholder of the given value in an explanation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One flag of Megatron-LM's, or a name of another trainer's, that is no option here."""

    name: str
    """Without the leading dashes: ``attention-dropout``."""
    kind: Kind
    """Number of words that follow it: none, one, or all up to the next option."""
    state: State
    words: str
    """Explanation without a full stop: what is done here (accepted), why not and what to do instead (refused), what to
    use meanwhile (not built yet; may be empty), or the option's name here (other name). ``VALUE`` stands for the
    given value."""
    values: tuple[str, ...] = ()
    """Values without effect here; an accepted flag without any has none under every value."""
    beside: tuple[str, ...] = ()
    """Options of which one must be given with an accepted flag; ``lacking`` is the error otherwise."""
    lacking: str = ""
    conversion: Conversion | None = None
    """Explanation by value for a value that is refused, in place of ``words``, which hold for every value."""

    @property
    def is_switch(self) -> bool:
        """Written without a value."""
        return self.kind == "switch"

    @property
    def takes_several(self) -> bool:
        """Written with all words up to the next option as its value."""
        return self.kind == "several"

    @property
    def can_agree(self) -> bool:
        """Return whether any of its values is accepted."""
        return self.state == "accepted" or bool(self.values)

    @property
    def expected(self) -> str:
        """Description of the allowed values, for an error."""
        return "true or false" if self.is_switch else " or ".join(self.values) or "that of Megatron-LM's option"

    def agrees(self, words: Sequence[str]) -> bool:
        """Return whether the flag with these words changes nothing here."""
        if not self.values:
            return self.state == "accepted"
        return all(any(_same(word, value) for value in self.values) for word in words)

    def refusal(self, written: str, values: Sequence[str] = (), given: Given = ANY_RUN) -> str:
        """The error about it in the command that is ``given``; ``written`` is the flag as the user wrote it, with its
        ``values``."""
        if self.state == "not built yet":
            return f"{written} is not built yet{self.words and f'; {self.words}'}."
        return f"{written}: {given.fitting(self._answer(values, given))}."

    def _answer(self, values: Sequence[str], given: Given) -> str:
        if self.conversion is not None:
            return self.conversion(" ".join(values), given)
        if self.state == "accepted":
            instead = f", or give {' or '.join(self.values)}" if self.values else ""
            return f"{self.words}; {LEAVE}{instead}"
        shown = " ".join(map(shlex.quote, values)) or VALUE
        return self.words.replace(VALUE, shown)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows under one title."""

    title: str
    rows: tuple[Row, ...]


def accepted(
    flag: str,
    words: str,
    values: str = "",
    *,
    beside: str = "",
    lacking: str = "",
    conversion: Conversion | None = None,
) -> Row:
    """A flag without effect here; with ``values``, separated by spaces, only where it has one of them, while
    ``conversion`` has the answers to others, and with ``beside`` only where one of these options is given, too."""
    row = _row(flag, "accepted", words, values)
    return replace(row, beside=tuple(beside.split()), lacking=lacking, conversion=conversion)


def refused(flag: str, words: str, conversion: Conversion | None = None) -> Row:
    """A flag whose meaning is not supported, or is that of another option, which ``words`` or ``conversion`` name."""
    return replace(_row(flag, "refused", words), conversion=conversion)


def not_yet(flag: str, words: str = "", values: str = "") -> Row:
    """A flag that will become an option; ``values``, separated by spaces, are those without effect today."""
    return _row(flag, "not built yet", words, values)


def other_name(flag: str, option: str) -> Row:
    """A flag whose every value means the same under the name of an option here; for a switch that says the opposite of
    one here, ``option`` begins with ``no-``."""
    return _row(flag, "other name", option)


def family(title: str, words: str, flags: str) -> Section:
    """Flags that are refused for the same reason."""
    return Section(title=title, rows=tuple(refused(flag, words) for flag in flags.split()))


def _row(flag: str, state: State, words: str, values: str = "") -> Row:
    """``flag`` ends in ``=`` where a value follows, and in ``=*`` where several may."""
    name, has_value, several = flag.partition("=")
    kind: Kind = "several" if several else "value" if has_value else "switch"
    return Row(name=name, kind=kind, state=state, words=words, values=tuple(values.split()))


def _same(word: str, value: str) -> bool:
    try:
        return float(word) == float(value)
    except ValueError:
        return word == value
