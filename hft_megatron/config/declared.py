"""Declarations of options beside their types and defaults, and the checks that follow from them.

Bounds are those of annotated-types, as in ``Annotated[int, Ge(1)]``: one check knows them, and the help shows them.
``SAME_RUN`` marks what a resumed run must share with its checkpoints, ``FormerName`` an option that was renamed.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import textwrap
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from hft_megatron.config.names import Names, known
from hft_megatron.errors import UserError

SAME_RUN: Final = "same run"
"""Marks an option that is part of a run's identity."""


@dataclass(frozen=True)
class FormerName:
    """The field's name in earlier versions: still accepted on the command line and in files, until 1.0."""

    field: str


_BOUNDS: Mapping[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("of at least", operator.ge),
    Gt: ("above", operator.gt),
    Le: ("at most", operator.le),
    Lt: ("below", operator.lt),
}
"""Words for a sentence and the comparison, by the kind of bound."""


def flag(name: str) -> str:
    """A field of the options as on the command line: ``--hft-ratio`` for ``hft_ratio``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One option: a field of a group."""

    name: str
    """Name of the field: ``hft_ratio``."""
    type: Any
    """Type of its value; None, for unset, is left out."""
    marks: tuple[Any, ...]
    """Bounds, and whatever else ``Annotated`` holds."""
    default: Any

    @property
    def former_name(self) -> str | None:
        """The field's name in earlier versions, where it had another one."""
        return next((mark.field for mark in self.marks if isinstance(mark, FormerName)), None)

    @property
    def identity_key(self) -> str:
        """The option's key in ``run_identity.json``, which a new name does not change."""
        return self.former_name or self.name

    @property
    def bounds(self) -> str:
        """The bounds in words, such as ``of at least 1`` or ``above 0 and at most 1``; empty where there are none."""
        low, *high = [mark for mark in self.marks if type(mark) in _BOUNDS] or [None]
        if low is None:
            return ""
        if not high:
            return f"{_BOUNDS[type(low)][0]} {_limit(low):g}"
        if isinstance(low, Gt):
            return " and ".join(f"{_BOUNDS[type(mark)][0]} {_limit(mark):g}" for mark in (low, high[0]))
        words = "from {:g} to below {:g}" if isinstance(high[0], Lt) else "between {:g} and {:g}"
        return words.format(_limit(low), _limit(high[0]))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of an option with a fixed set of values; none for others."""
        if get_origin(self.type) is Literal:
            return get_args(self.type)
        return tuple(known(self.type)) if isinstance(self.type, type) and issubclass(self.type, Names) else ()

    @property
    def expected(self) -> str:
        """Description of the allowed values, for a sentence: ``a number of at least 0``."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if get_origin(self.type) is tuple:
            several = {int: "whole numbers", float: "numbers"}
            return f"one or more {several.get(get_args(self.type)[0], 'words')}"
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        return f"{kinds[self.type]} {self.bounds}".rstrip()

    @property
    def facts(self) -> tuple[str, ...]:
        """Bounds and default, for a reader: ``at least 1`` and ``default: 8``."""
        bounds = self.bounds.removeprefix("of ")
        return (*([bounds] if bounds else []), f"default: {_shown(self.default)}")

    def allows(self, value: Any) -> bool:
        """Return whether a value of a JSON type is allowed; None is not."""
        if self.choices:
            return value in self.choices
        if self.type not in (int, float):
            return type(value) is self.type
        if type(value) not in (self.type, int) or not math.isfinite(value):
            return False
        return all(_BOUNDS[type(mark)][1](value, _limit(mark)) for mark in self.marks if type(mark) in _BOUNDS)


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "unset"
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) or "empty"


def _limit(mark: Any) -> float:
    """The number of a bound, which annotated-types keeps under its kind: ``Ge(1).ge``."""
    limit: float = getattr(mark, type(mark).__name__.lower())
    return limit


@cache
def declared(group: type) -> Mapping[str, Declared]:
    """The options of a dataclass, by the names of its fields."""
    hints = get_type_hints(group, include_extras=True)
    found = {}
    for field in fields(group):
        kind, marks = _taken_apart(hints[field.name])
        found[field.name] = Declared(name=field.name, type=kind, marks=marks, default=field.default)
    return found


@cache
def words_of(group: type) -> Mapping[str, str]:
    """The texts below the fields of a dataclass and its bases, each as one line, by field."""
    found: dict[str, str] = {}
    for base in reversed(group.__mro__):
        if is_dataclass(base):
            with suppress(OSError):  # A class that was made in a program has no source, and its bases have the texts.
                found |= _texts_in(inspect.getsource(base))
    return found


def _texts_in(source: str) -> dict[str, str]:
    [definition] = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split()).replace("``", "`")
    return found


def _taken_apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """``int`` and the marks of ``Annotated[int, ...] | None`` in either order of the two."""
    marks: tuple[Any, ...] = ()
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            marks += tuple(more)
        else:
            kept = [choice for choice in get_args(hint) if choice is not type(None)]
            assert len(kept) == 1, "an option has one type"
            (hint,) = kept
    return hint, marks


def check_bounds(options: object) -> None:
    """Raises UserError for the first number, of a group or of all groups in it, that its declaration doesn't allow."""
    kind: type = type(options)
    for name, option in declared(kind).items():
        value = getattr(options, name)
        if is_dataclass(value):
            check_bounds(value)
        elif value is not None and option.bounds and not option.allows(value):
            raise UserError(f"{flag(name)} {value}: must be {option.expected}.")
