"""Whether a chat template prints all that messages have: their texts, and other keys such as ``tool_calls``.

It is asked by rendering the conversation again with a value changed: where the text stays the same, what stands there
would be lost, and the model would learn an answer without it.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hft_megatron.data.formats.keys import message_row
from hft_megatron.data.printable import printable
from hft_megatron.data.rendering import Renderer, TemplateError
from hft_megatron.data.special_tokens import ESCAPE

_ROTATED = str.maketrans(
    "".join((string.ascii_lowercase, string.ascii_uppercase, string.digits)),
    "".join(part[1:] + part[0] for part in (string.ascii_lowercase, string.ascii_uppercase, string.digits)),
)
"""Another letter or digit for each, so that a text of a given length or kind stays one."""

_USUAL_ROLES = ("system", "user", "assistant")


class PrintedKeys:
    """The answers for one template, kept for conversations of the same shape."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._known: dict[tuple[object, ...], bool] = {}
        self._all_texts: set[tuple[object, ...]] = set()
        """Shapes of conversations of which the template prints every text."""

    def check_keys(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise TemplateError for a message with a key that is refused, or is not printed and not harmless."""
        for index, message in enumerate(messages):
            for key in _others(message):
                row = message_row(key)
                if row is not None and row.treatment == "refused":
                    raise TemplateError(
                        f"`{key}` of message {index + 1} stands for {row.meaning}, which nothing here reads; remove "
                        f"it, or pass over it with --ignore-keys {key}"
                    )
        for index, key in self._unprinted(messages):
            if not _is_harmless(key):
                raise TemplateError(
                    f"the chat template doesn't print `{printable(key)}` of message {index + 1}, which would be lost; "
                    f"choose a template that does, or pass over it with --ignore-keys {printable(key)}"
                )

    def harmless(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Keys that the template doesn't print, and that say nothing which the others don't."""
        return (key for _, key in self._unprinted(messages) if _is_harmless(key))

    def check_texts(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise TemplateError for a message whose text is not printed; all are looked for at once."""
        shape = tuple((message["role"], bool(message["content"]), frozenset(message)) for message in messages)
        if shape in self._all_texts:
            return
        marked = [
            {**message, "content": _mark(index)} if message["content"] else message
            for index, message in enumerate(messages)
        ]
        try:
            text = self._renderer.render(marked, add_generation_prompt=False)
        except TemplateError:  # a template may want texts of a certain form
            text = ""
        for index, message in enumerate(messages):
            if message["content"] and _mark(index) not in text and not self._prints(messages, index, "content"):
                raise TemplateError(
                    f"the chat template doesn't print the text of message {index + 1} (of the role "
                    f"{message['role']}{''.join(f', with `{printable(key)}`' for key in _others(message))}), which "
                    f"would be lost; choose a template that does, or remove the message"
                )
        self._all_texts.add(shape)

    def _unprinted(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
        """(index of the message, key) of every value, or entry of a list, that the text doesn't depend on."""
        for index, message in enumerate(messages):
            for key in _others(message):
                if message[key] != "" and not self._prints(messages, index, key):
                    yield index, key

    def _prints(self, messages: Sequence[Mapping[str, Any]], index: int, key: str) -> bool:
        message = messages[index]
        value = message[key]
        shape = (
            tuple(message["role"] for message in messages),
            index,
            key,
            frozenset(message),
            bool(message.get("content")),
            len(value) if isinstance(value, list) else type(value),
        )
        if shape not in self._known:
            try:
                text = self._renderer.render(messages, add_generation_prompt=False)
            except TemplateError:
                # It may have no place for a call without a text, of which the call is what would be lost.
                messages = [{**message, "content": message["content"] or ""} for message in messages]
                text = self._renderer.render(messages, add_generation_prompt=False)
            self._known[shape] = all(self._differs(messages, index, key, other, text) for other in _changed(value))
        return self._known[shape]

    def _differs(self, messages: Sequence[Mapping[str, Any]], index: int, key: str, value: object, text: str) -> bool:
        changed = [{**message, key: value} if n == index else message for n, message in enumerate(messages)]
        try:
            return self._renderer.render(changed, add_generation_prompt=False) != text
        except TemplateError:  # it has looked at the value
            return True


def unusual_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    """What to add to a template's refusal, which may be about these roles; empty without any."""
    found = dict.fromkeys(message["role"] for message in messages if message["role"] not in _USUAL_ROLES)
    return f" (messages have the role {' and '.join(found)}, which not every template has)" if found else ""


def _others(message: Mapping[str, Any]) -> list[str]:
    return [key for key in message if key not in ("role", "content")]


def _mark(index: int) -> str:
    return f"{ESCAPE}{index}{ESCAPE}"


def _is_harmless(key: str) -> bool:
    row = message_row(key)
    return row is not None and row.treatment == "harmless"


def _changed(value: object) -> Iterator[object]:
    """``value`` with other texts and numbers in it; of a list, with each of its entries changed in turn."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield [*value[:index], _other(entry), *value[index + 1 :]]
    else:
        yield _other(value)


def _other(value: object) -> object:
    if isinstance(value, str):
        rotated = value.translate(_ROTATED)
        return f"{value}x" if rotated == value else rotated
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, Mapping):
        return {key: _other(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_other(inner) for inner in value]
    return value
