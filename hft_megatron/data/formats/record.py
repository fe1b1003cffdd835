"""What a record can be, and the checks that every layout shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hft_megatron.errors import UserError

ROLES = ("system", "user", "assistant", "developer", "tool", "ipython", "function", "observation")
"""Those that published chat templates know. Which of them a run's template has is seen when it renders them."""
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Keys of one record, or of its messages, that nothing is made of."""

    unread: tuple[str, ...] = ()
    """Those that are harmless, or that no trainer is known to read."""
    ignored: tuple[str, ...] = ()
    """Those that --ignore-keys names."""


NOTHING = PassedOver()


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; keys of a message other than ``role`` and ``content`` are for the chat template."""

    place: str
    """``file:line`` or the like, for errors."""
    messages: tuple[Message, ...]
    given: int = 0
    """Messages at the beginning that are a prompt: what the assistant says there is not what is learned."""
    untrained: frozenset[int] = frozenset()
    """Indices of messages that the record itself takes out of what is learned."""
    repeated: bool = False
    """Whether the completion repeated the prompt, and it was taken off."""
    keys: PassedOver = NOTHING


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and what should follow it, both as they are: nothing is put between them."""

    place: str
    prompt: str
    completion: str
    repeated: bool = False
    """Whether the completion repeated the prompt, and it was taken off."""
    keys: PassedOver = NOTHING


PromptForm = Literal["given", "stripped", "found", "in one answer", "in both answers"]
"""Where the prompt of a pair was: on its own; on its own and again in front of both answers, where it was taken off; in
front of both answers alone; on its own and again in front of one answer, which was left as it is; on its own and again
in front of both, which were left because answers may begin with such a prompt themselves."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt and two answers, of which the first is preferred; all three text, or all three messages."""

    place: str
    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    form: PromptForm = "given"
    fault: str | None = None
    """Why these are no two answers to one prompt, as a clause; None where they are."""
    keys: PassedOver = NOTHING


Record = Chat | Completion | Preference


def text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under ``key``. Raises UserError where it is missing or something else."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{place}: `{key}` is {kind_of(value) if key in row else 'missing'}, but it must be text.")
    return value


def optional_text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under ``key``, empty where it is missing or null."""
    return "" if row.get(key) is None else text_of(row, key, place)


def checked_messages(messages: object, place: str, *, key: str = "messages") -> tuple[Message, ...]:
    """The list under ``key`` as messages with a known role and text. Raises UserError naming the message."""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{place}: `{key}` is {kind_of(messages)}, but it must be a list of at least one message"
            f"{list_within_text(messages)}."
        )
    of = "" if key == "messages" else f" of `{key}`"
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(
                f"{place}: message {number}{of} is {kind_of(message)}, but it must be an object with a role."
            )
        if message.get("role") not in ROLES:
            raise UserError(
                f"{place}: message {number}{of} has the role {shortened(message.get('role'))}, but it must be one of "
                f"{', '.join(ROLES)}."
            )
        content = message.get("content")
        if isinstance(content, list) and content:
            content = _joined_parts(content, f"{place}: the `content` of message {number}{of}")
        # What OpenAI writes beside a call: the template gets it as it is.
        is_call_alone = content is None and any(message.get(key) for key in ("tool_calls", "function_call"))
        if not isinstance(content, str) and not is_call_alone:
            kind = kind_of(content) if "content" in message else "missing"
            raise UserError(f"{place}: the `content` of message {number}{of} is {kind}, but it must be text.")
        checked.append({**message, "content": content})
    return tuple(checked)


def _joined_parts(parts: Sequence[object], whose: str) -> str:
    """The text of OpenAI's and TRL's ``{"type": "text", "text"}``, with nothing between the parts, as templates print
    them. Raises UserError for a part of another type, or with more in it."""
    texts = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, dict):
            raise UserError(f"{whose} has {kind_of(part)} as part {number}, but a part must be an object with a type.")
        # Parquet and some tools write every key that any part has.
        keys = [key for key, value in part.items() if value is not None]
        if part.get("type") != "text":
            raise UserError(f"{whose} has the type {shortened(part.get('type'))} in part {number}; only text is read.")
        if not isinstance(part.get("text"), str):
            kind = kind_of(part["text"]) if "text" in part else "missing"
            raise UserError(f"{whose} has a part {number} whose `text` is {kind}, but it must be text.")
        if set(keys) != {"type", "text"}:
            more = next(key for key in keys if key not in ("type", "text"))
            raise UserError(f"{whose} has the key {shortened(more)} in part {number}, beside type and text; remove it.")
        texts.append(part["text"])
    return "".join(texts)


def chat(place: str, messages: Sequence[Message]) -> Chat:
    """A conversation to learn from. Raises UserError where no turn is the assistant's."""
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place}: the conversation has no assistant turn, so there is nothing to learn; remove it.")
    return Chat(place=place, messages=tuple(messages))


def check_seam(prompt: Sequence[Message], answer: Sequence[Message], place: str, key: str, answer_key: str) -> None:
    """Raise UserError where an answer would be a second turn of the assistant's behind the prompt's last one."""
    if prompt and prompt[-1]["role"] == answer[0]["role"] == "assistant":
        raise UserError(
            f"{place}: the last message of `{key}` is the assistant's, and `{answer_key}` begins with the assistant, "
            f"too, which makes two turns in a row; take that message out of `{key}`, and put its text in front of "
            f"`{answer_key}` where the answer continues it."
        )


def kind_of(value: object) -> str:
    """What JSON calls the value's type, with its article; Parquet has more types than JSON."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names: dict[type, str] = {bool: "a truth value", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def list_within_text(value: object) -> str:
    """What to add where a list was asked for and ``value`` is a text that holds one; empty for anything else."""
    is_json = isinstance(value, str) and value.lstrip().startswith("[")
    return "; the text holds JSON: write the list itself, in a file of JSON Lines" if is_json else ""


def shortened(value: object) -> str:
    """The value as Python writes it, cut to 40 characters."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
