"""The parts of a nested JSON value: its structure, its leaves, and copies of it with other leaves."""

import string
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
"""The keys and indices that lead from a value to a part of it."""
_ROTATED = str.maketrans(
    "".join((string.ascii_lowercase, string.ascii_uppercase, string.digits)),
    "".join(part[1:] + part[0] for part in (string.ascii_lowercase, string.ascii_uppercase, string.digits)),
)
"""Another letter or digit for each, so that a text of a given length or kind stays one."""


def structure_of(value: object) -> object:
    """The names and types in ``value``, and which leaves hold something: equal for values that differ in leaves alone.

    Whether a leaf holds something is a part of it, because templates ask whether a value is true.
    """
    if isinstance(value, Mapping):
        return tuple((key, structure_of(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return "list", tuple(structure_of(inner) for inner in value)
    return type(value), bool(value)


def leaves_of(value: object) -> Iterator[tuple[Path, object]]:
    """(path, leaf) of every text, number and truth value; nulls, empty texts, lists and objects hold nothing."""
    if isinstance(value, Mapping | list):
        inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in inside:
            yield from (((key, *path), leaf) for path, leaf in leaves_of(inner))
    elif value is not None and value != "":
        yield (), value


def replaced(value: Any, path: Path, leaf: object) -> Any:
    """``value`` with ``leaf`` at the path; all of it for an empty path."""
    if not path:
        return leaf
    key, *rest = path
    inner = replaced(value[key], tuple(rest), leaf)
    if isinstance(value, list):
        assert isinstance(key, int)
        return [*value[:key], inner, *value[key + 1 :]]
    return {**value, key: inner}


def changed(leaf: object) -> object:
    """Another leaf of the same type, and a text of the same length where it has a letter or a digit; a text for what is
    no leaf."""
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int | float):
        return leaf + 1
    rotated = leaf.translate(_ROTATED) if isinstance(leaf, str) else ""
    return f"{leaf}x" if rotated in (leaf, "") else rotated


def in_words(path: Path) -> str:
    """The path as code would have it, such as ``[0].function.name``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
