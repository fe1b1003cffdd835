"""What the table of Megatron-LM's flags and other trainers' names is made of: rows, and short ways to write them."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

Kind = Literal["switch", "value", "several"]
State = Literal["accepted", "refused", "not built yet", "other name"]
Conversion = Callable[[str, Mapping[str, str]], str]
"""What a value is here, as words without a full stop, by the value and the values of all that is given, by name."""
VALUE = "VALUE"
"""Stands in words for the value that was given."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One flag of Megatron-LM's, or a name of another trainer's, that is no option here."""

    name: str
    """Without the leading dashes: ``attention-dropout``."""
    kind: Kind
    """How many words follow it: none, one, or all up to the next option."""
    state: State
    words: str
    """Without a full stop. Of an accepted flag what is done here, of a refused one why and what to do instead, of one
    that is not built what serves meanwhile (may be empty), of another name the option's name here. ``VALUE`` in them
    stands for the value."""
    values: tuple[str, ...] = ()
    """Values that say what is done anyway; of an accepted flag without any, every value does."""
    beside: tuple[str, ...] = ()
    """Options of which one must be given with an accepted flag, or ``lacking`` is said of it."""
    lacking: str = ""
    conversion: Conversion | None = None
    """Of a refused flag whose words depend on its value: gives them in place of ``words``, which hold for any."""

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
        """Whether there is anything to give it that is done anyway."""
        return self.state == "accepted" or bool(self.values)

    @property
    def expected(self) -> str:
        """What its value must be, in words for an error."""
        return "true or false" if self.is_switch else " or ".join(self.values) or "that of Megatron-LM's option"

    def agrees(self, words: Sequence[str]) -> bool:
        """Whether the flag with these words asks for nothing but what is done anyway."""
        if not self.values:
            return self.state == "accepted"
        return all(any(_same(word, value) for value in self.values) for word in words)

    def refusal(self, written: str, values: Sequence[str] = (), given: Mapping[str, str] = MappingProxyType({})) -> str:
        """The sentence about it; ``written`` is the flag as the user wrote it, with its ``values``, and ``given`` has
        the values of all that is given, by name."""
        if self.state == "not built yet":
            return f"{written} is not built yet{self.words and f'; {self.words}'}."
        if self.state == "accepted":
            instead = f", or give {' or '.join(self.values)}" if self.values else ""
            return f"{written}: {self.words}; leave it out{instead}."
        value = " ".join(values)
        if self.conversion is not None:
            return f"{written}: {self.conversion(value, given)}."
        shown = " ".join(map(shlex.quote, values)) or VALUE
        return f"{written}: {self.words.replace(VALUE, shown)}."


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows under one title."""

    title: str
    rows: tuple[Row, ...]


def accepted(flag: str, words: str, values: str = "", *, beside: str = "", lacking: str = "") -> Row:
    """A flag that asks for what is done anyway; with ``values``, separated by spaces, only where it has one of them,
    and with ``beside`` only where one of these options is given, too."""
    return replace(_row(flag, "accepted", words, values), beside=tuple(beside.split()), lacking=lacking)


def refused(flag: str, words: str, conversion: Conversion | None = None) -> Row:
    """A flag that is not taken: its meaning can't be had, or it is another option with, perhaps, another value."""
    return replace(_row(flag, "refused", words), conversion=conversion)


def not_yet(flag: str, words: str = "", values: str = "") -> Row:
    """A flag that an option here is to be built for; ``values``, separated by spaces, ask for what is done today."""
    return _row(flag, "not built yet", words, values)


def other_name(flag: str, option: str) -> Row:
    """A flag whose every value means the same under the name of an option here; for a switch that says the opposite of
    one here, ``option`` begins with ``no-``."""
    return _row(flag, "other name", option)


def family(title: str, words: str, flags: str) -> Section:
    """Flags that are refused for one reason."""
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
