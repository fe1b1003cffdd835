"""Checks that a chat template prints everything in messages: their texts, and other keys such as ``tool_calls``.

It renders the conversation again with a changed value: where the text stays the same, the value would be lost, and the
model would learn an answer without it.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.data.formats.keys import is_empty, message_row
from hft_megatron.data.record_errors import printable
from hft_megatron.data.rendering import Renderer, TemplateError
from hft_megatron.data.tokenizer import ESCAPE

Path = tuple[str | int, ...]
"""The keys and indices that lead from a value to a part of it."""
_ROTATED = str.maketrans(
    "".join((string.ascii_lowercase, string.ascii_uppercase, string.digits)),
    "".join(part[1:] + part[0] for part in (string.ascii_lowercase, string.ascii_uppercase, string.digits)),
)
"""Another letter or digit for each, so that a text of a given length or kind stays one."""


def structure_of(value: object) -> object:
    """The names and types in ``value``, and which leaves are not empty: equal for values that differ in leaves alone.

    It includes whether a leaf is empty, because templates ask whether a value is true.
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
    """Another leaf of the same type, and a text of the same length where it has a letter or a digit; a text for a value
    that is no leaf."""
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int | float):
        return leaf + 1
    rotated = leaf.translate(_ROTATED) if isinstance(leaf, str) else ""
    return f"{leaf}x" if rotated in (leaf, "") else rotated


def in_words(path: Path) -> str:
    """The path in code notation, such as ``[0].function.name``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


_USUAL_ROLES = ("system", "user", "assistant")
_HARMLESS_OF_CALLS = ("id", "type")
"""Keys of a tool call whose content follows from its place and its other keys."""
_NUMBER = 8_461_730_000
"""A number that replaces another, so long that hardly a text has it; used where no text does."""
_MOST_KEPT = 20_000
"""Number of shapes whose answers are kept: tool arguments may have another shape in every record."""


@dataclass(frozen=True, kw_only=True)
class _Unprinted:
    """A value that the text doesn't depend on."""

    index: int
    """Index of the message."""
    key: str
    part: str = ""
    """The part of the value in words; empty for all of it."""


class PrintedKeys:
    """The answers for one template, kept for conversations of the same shape."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._known: dict[object, tuple[_Unprinted, ...]] = {}
        self._all_texts: set[object] = set()
        """Shapes of conversations of which the template prints every text."""

    def check_keys(self, messages: Sequence[Mapping[str, Any]], *, first: int = 0) -> None:
        """Raise TemplateError for a message, from the index ``first`` on, with a key that is refused, or is not printed
        and not harmless."""
        for index, message in enumerate(messages):
            for key in _others(message):
                row = message_row(key, message["role"])
                if row is not None and row.treatment == "refused" and not is_empty(message[key]):
                    raise TemplateError(
                        f"`{key}` of message {index + 1} means {row.meaning}, which is not supported here; remove "
                        f"it, or ignore it with --ignore-keys {key}"
                    )
        for found in self._unprinted(messages):
            if found.index >= first and not _is_harmless(messages, found):
                key = printable(found.key, keep=ESCAPE)
                part = f" (`{printable(found.part, keep=ESCAPE)}` in it)" if found.part else ""
                raise TemplateError(
                    f"the chat template doesn't print {'all of ' * bool(part)}`{key}` of message "
                    f"{found.index + 1}{part}, which would be lost; choose a template that does, or ignore it with "
                    f"--ignore-keys {key}"
                )

    def harmless(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Keys that the template doesn't print, and that are empty or redundant."""
        return (found.key for found in self._unprinted(messages) if _is_harmless(messages, found))

    def check_texts(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise TemplateError for a message whose text is not printed; all are searched for at once."""
        shape = _shape(messages)
        if shape in self._all_texts:
            return
        marked = [
            {**message, "content": _mark(index)} if message["content"] else message
            for index, message in enumerate(messages)
        ]
        text = self._rendered(marked)  # a template may want texts of a certain form
        for index, message in enumerate(messages):
            if message["content"] and _mark(index) not in text and not self._prints_text(messages, index):
                others = "".join(f", with `{printable(key, keep=ESCAPE)}`" for key in _others(message))
                raise TemplateError(
                    f"the chat template doesn't print the text of message {index + 1} (of the role {message['role']}"
                    f"{others}), which would be lost; choose a template that does, or remove the message"
                )
        _make_room(self._all_texts)
        self._all_texts.add(shape)

    def _prints_text(self, messages: Sequence[Mapping[str, Any]], index: int) -> bool:
        text = self._renderer.render(messages, add_generation_prompt=False)
        return self._differs(messages, index, "content", changed(messages[index]["content"]), text)

    def _unprinted(self, messages: Sequence[Mapping[str, Any]]) -> tuple[_Unprinted, ...]:
        """Every key whose value, or a part of it, the text doesn't depend on."""
        if all(message.keys() <= {"role", "content"} for message in messages):
            return ()
        shape = _shape(messages)
        if shape not in self._known:
            _make_room(self._known)
            self._known[shape] = tuple(self._find_unprinted(messages))
        return self._known[shape]

    def _find_unprinted(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[_Unprinted]:
        try:
            text = self._renderer.render(messages, add_generation_prompt=False)
        except TemplateError:
            # It may not support a call without a text, and then the call would be lost.
            messages = [{**message, "content": message["content"] or ""} for message in messages]
            text = self._renderer.render(messages, add_generation_prompt=False)
        seen = self._leaves_seen(messages, text)
        for index, message in enumerate(messages):
            for key in _others(message):
                left = [part for part in _telling(message[key]) if (index, key, part[0]) not in seen]
                if (part := self._first_lost(messages, index, key, left, text)) is not None:
                    yield _Unprinted(index=index, key=key, part=part)

    def _leaves_seen(self, messages: Sequence[Mapping[str, Any]], text: str) -> set[tuple[int, str, Path]]:
        """(index of the message, key, path) of leaves that are found in the text when each has a mark of its own. The
        others, all of them where the template refuses the marks, are to be changed one by one."""
        marks: dict[tuple[int, str, Path], str] = {}
        marked = [dict(message) for message in messages]
        for index, message in enumerate(messages):
            for key in _others(message):
                if _says_nothing(key, message["role"]):
                    continue  # templates want ids of a certain form
                for path, leaf in _telling(message[key]):
                    mark = _mark_like(leaf, len(marks))
                    if mark is not None and str(mark) not in text:
                        marks[index, key, path] = str(mark)
                        marked[index][key] = replaced(marked[index][key], path, mark)
        found = self._rendered(marked)
        return {place for place, mark in marks.items() if mark in found}

    def _first_lost(
        self,
        messages: Sequence[Mapping[str, Any]],
        index: int,
        key: str,
        parts: Sequence[tuple[Path, object]],
        text: str,
    ) -> str | None:
        """The part of the value that is not printed, in words, empty where no part of it is; None where all are.

        The whole value comes first: that it isn't printed says more than that its first part isn't."""
        value = messages[index][key]
        everything = value
        for path, leaf in _telling(value):
            everything = replaced(everything, path, changed(leaf))
        if parts and not self._differs(messages, index, key, everything, text):
            return ""
        for path, leaf in parts:
            if not self._differs(messages, index, key, replaced(value, path, changed(leaf)), text):
                return in_words(path)
        return None

    def _differs(self, messages: Sequence[Mapping[str, Any]], index: int, key: str, value: object, text: str) -> bool:
        other = [{**message, key: value} if n == index else message for n, message in enumerate(messages)]
        try:
            return self._renderer.render(other, add_generation_prompt=False) != text
        except TemplateError:  # it has looked at the value
            return True

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text; empty where the template refuses the messages."""
        try:
            return self._renderer.render(messages, add_generation_prompt=False)
        except TemplateError:
            return ""


def unusual_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    """Addition to a template's refusal, which may be about these roles; empty without any."""
    found = dict.fromkeys(message["role"] for message in messages if message["role"] not in _USUAL_ROLES)
    return f" (messages have the role {' and '.join(found)}, which not every template has)" if found else ""


def _others(message: Mapping[str, Any]) -> list[str]:
    return [key for key in message if key not in ("role", "content")]


def _shape(messages: Sequence[Mapping[str, Any]]) -> object:
    """Everything that the answers depend on: a message's role, whether it has text, and its other keys' structure."""
    return tuple(
        (
            message["role"],
            bool(message["content"]),
            structure_of({key: message[key] for key in _others(message)}),
        )
        for message in messages
    )


def _telling(value: object) -> list[tuple[Path, object]]:
    """(path, leaf) of everything that would be lost with the value; a value without such leaves is one itself."""
    leaves = [(path, leaf) for path, leaf in leaves_of(value) if not _names_a_call(path)]
    return leaves or [((), value)]


def _names_a_call(path: Path) -> bool:
    """True for a key of the value, or of an entry of it, and not one of a tool's arguments."""
    keys = path[1:] if path and isinstance(path[0], int) else path
    return len(keys) == 1 and keys[0] in _HARMLESS_OF_CALLS


def _make_room(kept: dict[object, Any] | set[object]) -> None:
    if len(kept) >= _MOST_KEPT:
        kept.clear()


def _mark(index: int) -> str:
    """A text that no message has; the names of special tokens are hidden behind others."""
    return f"{ESCAPE}.{index}{ESCAPE}"


def _mark_like(leaf: object, number: int) -> str | int | None:
    """A text or a number that identifies the leaf's place; None for a leaf that has no place in a text."""
    if isinstance(leaf, str) and leaf:
        return _mark(number)
    return _NUMBER + number if isinstance(leaf, int | float) and not isinstance(leaf, bool) else None


def _is_harmless(messages: Sequence[Mapping[str, Any]], found: _Unprinted) -> bool:
    message = messages[found.index]
    return _says_nothing(found.key, message["role"]) or is_empty(message[found.key])


def _says_nothing(key: str, role: str) -> bool:
    row = message_row(key, role)
    return row is not None and row.treatment == "harmless"
