"""The options of a command as a flat table, and the words of a command line as settings of that table.

tyro parses the values; this file decides what an option is called and words what is wrong with a name.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import takewhile
from typing import get_args, get_origin

import tyro

from hft_megatron.config.declared import Declared, declared, words_of
from hft_megatron.config.given import ANY_RUN, LEAVE, Given
from hft_megatron.config.megatron_flags import OF_OTHER_COMMANDS, ROWS, refused_value
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.names import Names, known
from hft_megatron.errors import UserError

CONSTRUCTORS = tyro.constructors.ConstructorRegistry()
"""Constructors of types that are not tyro's own."""


@CONSTRUCTORS.primitive_rule
def _names_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """Values of the types of ``config.names``: what is registered when a command line is read."""
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, Names)):
        return None
    names = tuple(known(kind))
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        choices=names,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One option: a leaf of the (nested) options dataclass."""

    option: Declared
    group: str | None
    """Name of the nested dataclass that holds it; None for an option of the command line alone (--config)."""
    owner: type
    """Dataclass that declares it."""

    @property
    def name(self) -> str:
        """Name on the command line, without the leading dashes: ``micro-batch-size``."""
        return self.option.name.replace("_", "-")

    @property
    def former_name(self) -> str | None:
        """Name in earlier versions, with dashes; None where it is the same."""
        former = self.option.former_name
        return None if former is None else former.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """True if it is written ``--name`` or ``--no-name``, without a value."""
        return self.option.type is bool

    @property
    def takes_several(self) -> bool:
        """True if it is written ``--name VALUE VALUE``: all words up to the next option are its value."""
        return get_origin(self.option.type) is tuple

    @property
    def expected(self) -> str:
        """Description of the allowed values, for an error."""
        return self.option.expected

    @property
    def placeholder(self) -> str:
        """Placeholder of its value in the help: its type, or its choices in braces."""
        if self.option.choices:
            return f"{{{','.join(map(str, self.option.choices))}}}"
        kind = get_args(self.option.type)[0] if self.takes_several else self.option.type
        return {int: "INT", float: "FLOAT"}.get(kind, "TEXT")

    @property
    def words(self) -> str:
        """Description from its declaration; empty without one."""
        return words_of(self.owner).get(self.option.name, "")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One option set once, by a word of the command line or a line of a file."""

    flag: Flag
    words: tuple[str, ...]
    """Words as written; ``True`` or ``False`` for a switch. More than one only where the option takes several."""
    where: str
    """Its name in errors: ``--lr``, or ``run.yaml:3: lr``."""

    @property
    def written(self) -> str:
        """The name that was used, with dashes: the option's own or another one for it."""
        return self.where.split()[-1].lstrip("-").replace("_", "-").removeprefix("no-")

    @property
    def is_former(self) -> bool:
        """True if it was given under its name of earlier versions."""
        return self.flag.former_name == self.written

    def contradicts(self, other: "Setting") -> bool:
        """True if the same option has another value there under another name; a renamed option has one name."""
        renamed = self.is_former or other.is_former
        return not renamed and self.written != other.written and self.words != other.words

    @property
    def value(self) -> str:
        """The words as one."""
        return " ".join(self.words)

    @property
    def arguments(self) -> list[str]:
        """Words for tyro, in the form that no value (empty, or with leading dashes) can be misread in."""
        if self.flag.is_switch:
            return [f"--{'' if self.value == 'True' else 'no-'}{self.flag.name}"]
        return [f"--{self.flag.name}={word}" for word in self.words]

    @property
    def refusal(self) -> str | None:
        """The error for a value that Megatron-LM's option of this name has and this one doesn't."""
        row = refused_value(self.flag.name, self.words)
        return None if row is None else row.refusal(self.where if self.flag.is_switch else f"{self.where} {self.value}")


def flags_of(options_type: type, group: str | None = None) -> dict[str, Flag]:
    """Every option of a dataclass of dataclasses, by its flat name."""
    found: dict[str, Flag] = {}
    for option in declared(options_type).values():
        if is_dataclass(option.type):
            assert isinstance(option.type, type)
            inner = flags_of(option.type, group=option.name)
        else:
            flag = Flag(option=option, group=group, owner=options_type)
            inner = {flag.name: flag}
        assert not found.keys() & inner.keys(), "two options have one name"
        found |= inner
    return found


ON, OFF = "true", "false"
"""Values with which a file or a call turns a switch on or off."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One flag of Megatron-LM's, or a name of another trainer's, that is no option here, given once."""

    row: Row
    words: tuple[str, ...]
    """Its values, as written; ``OFF`` alone for a switch that a file turns off, nothing for one that is on."""
    where: str
    """Its name in errors, as that of a setting."""

    @property
    def shown(self) -> str:
        """Its form on the command line."""
        return " ".join((f"--{self.row.name}", *self.words))

    @property
    def is_accepted(self) -> bool:
        """True if it changes nothing here."""
        return self.row.agrees(self.words) and not self._is_off

    @property
    def is_refused(self) -> bool:
        """Whether it is an error; a file may turn off a feature that does not exist."""
        return not self.is_accepted and not (self._is_off and self.row.state != "accepted")

    def refusal(self, given: Given) -> str:
        """The error about it in the command that is ``given``; a file may set the options of other commands, too."""
        if not _is_name(self.where):
            given = replace(given, others={})
        return self.row.refusal(" ".join((self.where, *map(_shown, self.words))), self.words, given)

    @property
    def _is_off(self) -> bool:
        return self.row.is_switch and self.words == (OFF,)


def _shown(word: str) -> str:
    """A word of a sentence, in quotes where it is empty or has spaces."""
    return word if word and not any(map(str.isspace, word)) else repr(word)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """Error about a word of the command line or a line of a file, as a sentence."""

    sentence: str


Item = Setting | Request | Mistake
_OF_TRAINING = "train-iters"
"""An option of every command that reads the table of Megatron-LM's flags."""


class Reading:
    """Settings of a file and a command line together; later ones override earlier ones."""

    def __init__(self, given: Given = ANY_RUN) -> None:
        self._command = given
        self.settings: dict[str, Setting] = {}
        """Settings by option."""
        self.accepted: dict[str, Request] = {}
        """Flags of Megatron-LM's without effect here, by name."""
        self._mistakes: dict[str, str | Request] = {}
        """Errors, or requests that they are about, by name, so that a value given later can take one back."""

    def take(self, items: Iterable[Item]) -> None:
        """Note what was read, in order."""
        for item in items:
            if isinstance(item, Mistake):
                self._mistakes[item.sentence] = item.sentence
            elif isinstance(item, Setting):
                before = self.settings.get(item.flag.name)
                self.settings[item.flag.name] = item
                self._note(item.flag.name, item.refusal)
                if before is not None and item.contradicts(before):
                    self._note(item.flag.name, f"{before.where} and {item.where} are one option; keep one of them.")
            else:
                self.accepted.pop(item.row.name, None)
                self._note(item.row.name, item if item.is_refused else None)
                if item.is_accepted:
                    self.accepted[item.row.name] = item

    @property
    def mistakes(self) -> list[str]:
        """Errors about names and values that are not supported."""
        lacking = [
            f"{request.shown} {request.row.lacking}."
            for request in self.accepted.values()
            if request.row.beside and self.settings.keys().isdisjoint(request.row.beside)
        ]
        refused = {name: item for name, item in self._mistakes.items() if isinstance(item, Request)}
        values = {name: item.value for name, item in self.settings.items()}
        values |= {name: " ".join(item.words) for name, item in refused.items()}
        given = replace(self._command, values=values)
        said = [item.refusal(given) if isinstance(item, Request) else item for item in self._mistakes.values()]
        return [*said, *lacking]

    def check(self, note: Callable[[str], None] | None = None) -> None:
        """Raise UserError with every mistake: one sentence, or a line for each.

        ``note`` is given a line about flags of Megatron-LM's without effect, and one for every former name.
        """
        check_all([self], note)

    def _note(self, name: str, refusal: str | Request | None) -> None:
        self._mistakes.pop(name, None)
        if refusal is not None:
            self._mistakes[name] = refusal


def check_all(readings: Sequence[Reading], note: Callable[[str], None] | None = None) -> None:
    """``Reading.check`` over several at once."""
    mistakes = list(dict.fromkeys(mistake for reading in readings for mistake in reading.mistakes))
    if len(mistakes) == 1:
        raise UserError(mistakes[0])
    if mistakes:
        raise UserError("\n  ".join((f"{len(mistakes)} options are not valid:", *mistakes)))
    if note is None:
        return
    for former, flag in {s.written: s.flag for r in readings for s in r.settings.values() if s.is_former}.items():
        note(f"> --{former} is now --{flag.name}; the old name is accepted until version 1.0")
    accepted = dict.fromkeys(request.shown for reading in readings for request in reading.accepted.values())
    if accepted:
        note(f"> accepted without effect here: {', '.join(accepted)}")


def named(name: str, flags: Mapping[str, Flag]) -> Flag | Row | None:
    """The option (of a switch also with ``no-`` before it) or the row of the table that a name with dashes means."""
    positive = flags.get(name.removeprefix("no-"))
    renamed = next((flag for flag in flags.values() if flag.former_name == name), None)
    if renamed is not None:
        return renamed
    if name in flags or (positive is not None and positive.is_switch):
        return flags.get(name, positive)
    if _OF_TRAINING not in flags:
        return None
    row = ROWS.get(name) or OF_OTHER_COMMANDS.get(name)
    return named(row.words, flags) if row is not None and row.state == "other name" else row


def turns_off(name: str, meant: Flag) -> bool:
    """Return whether a name with dashes, which means the switch ``meant``, turns it off."""
    row = ROWS.get(name)
    return f"no-{meant.name}" == (name if row is None else row.words)


def unknown_option(where: str, name: str, flags: Mapping[str, Flag], given: Given = ANY_RUN) -> Mistake:
    """The error for a name that is no option; ``where`` is its written form."""
    elsewhere = given.elsewhere(name)
    if elsewhere is not None:
        return Mistake(sentence=f"{where} {elsewhere}; {LEAVE}.")
    names = [*flags, *(f"no-{flag.name}" for flag in flags.values() if flag.is_switch)]
    # A name that only lacks its beginning, such as Megatron's --data-path, is nearer than letters tell.
    nearest = [known for known in names if known.endswith(f"-{name}")]
    nearest += difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"the nearest is --{nearest[0]}" if nearest else "--help-all lists all of them"
    return Mistake(sentence=f"{where} is not an option; {hint}.")


def items_of_arguments(arguments: Sequence[str], flags: Mapping[str, Flag], given: Given = ANY_RUN) -> Iterator[Item]:
    """The settings of a command line, in order; ``-`` and ``_`` in names are the same.

    Mistakes are names that are no option, values that are missing, and words that belong to no option.
    """
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        following = list(takewhile(lambda word: not word.startswith("--"), arguments[position:]))
        if not _is_name(word):
            position += len(following)
            yield Mistake(
                sentence=f"The word {word!r} belongs to no option; options start with --, and --help-all shows which "
                "take several values."
            )
            continue
        item, taken = _item_of_word(word, following, flags, given)
        position += taken
        yield item


def _is_name(word: str) -> bool:
    return word.startswith("--") and word != "--"


def _item_of_word(word: str, following: Sequence[str], flags: Mapping[str, Flag], given: Given) -> tuple[Item, int]:
    """The setting of an option with the words up to the next one, and the number of these words that are its own."""
    written, has_value, value = word.partition("=")
    name = written[2:].replace("_", "-")
    meant = named(name, flags)
    if meant is None:
        return unknown_option(written, name, flags, given), len(following)
    values: tuple[str, ...] = (value,) if has_value else ()
    if meant.takes_several:
        values += tuple(following)
    elif not has_value:
        values = tuple(word for word in following[:1] if not meant.is_switch or word.lower() in (ON, OFF))
    taken = len(values) - bool(has_value)
    is_refused = isinstance(meant, Row) and not meant.can_agree
    if meant.is_switch and values and not (is_refused and values[0].lower() != OFF):
        return _no_value(" ".join((word, *values[:taken])), name, values[0], meant), taken
    if isinstance(meant, Row) and is_refused:
        # The run ends, so that what follows need not be told from its values.
        return Request(row=meant, words=values, where=written), len(following)
    if not values and not meant.is_switch:
        return Mistake(sentence=f"{written} needs a value: {meant.expected}."), 0
    if isinstance(meant, Row):
        return Request(row=meant, words=values, where=written), taken
    words = (str(not turns_off(name, meant)),) if meant.is_switch else values
    return Setting(flag=meant, words=words, where=written), taken


def _no_value(given: str, name: str, value: str, meant: Flag | Row) -> Mistake:
    """The error for a switch with a value, with the form that has this meaning where it is clear."""
    instead = f"write --{meant.name}"
    if isinstance(meant, Flag) and value.lower() in (ON, OFF):
        is_on = (value.lower() == ON) != turns_off(name, meant)
        instead = f"write --{meant.name if is_on else f'no-{meant.name}'}"
    elif isinstance(meant, Flag):
        instead = f"write --{meant.name} or --no-{meant.name}"
    elif value.lower() == OFF:
        instead = LEAVE
    return Mistake(sentence=f"{given}: a switch takes no value; {instead}.")
