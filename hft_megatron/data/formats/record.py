"""A record of any format as messages or texts, and the weights and masks that it gives to its turns.

The options of a run say what is trained of all records; a turn's own key can only take it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hft_megatron.data.formats.keys import TURN_MASKS, TURN_SWITCHES, TURN_WEIGHTS, is_empty
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


def weigh(record: Record) -> Record:
    """``record`` without those keys in its messages, and without empty lists; a conversation with what the keys say.

    Raises UserError naming the message for a value that is neither yes nor no, for keys that contradict each other,
    for a turn that is not the assistant's and shall be trained, and for an answer of a pair that shall not.
    """
    if isinstance(record, Completion):
        return record
    if isinstance(record, Chat):
        messages, untrained = _take(record.messages, record.place)
        return replace(record, messages=messages, untrained=untrained)
    return _without_weights(record)


def _without_weights(pair: Preference) -> Preference:
    """The pair, whose prompt is never trained and whose answers are compared whole."""
    parts: dict[str, Any] = {}
    for name, part in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(part, str):
            continue
        parts[name], untrained = _take(part, pair.place, of=f" of `{name}`")
        answers = [number for number in sorted(untrained) if part[number]["role"] == "assistant"]
        if name != "prompt" and answers:
            raise UserError(
                f"{pair.place}: message {answers[0] + 1} of `{name}` is not to be trained, but the answers of a pair "
                f"are compared whole; remove that key, or pass over it with --ignore-keys."
            )
    return replace(pair, **parts)


def _take(messages: Sequence[Message], place: str, of: str = "") -> tuple[tuple[Message, ...], frozenset[int]]:
    """The messages without their weights, and the indices of those that are not to be trained."""
    kept, untrained = [], set()
    if all(len(message) == 2 for message in messages):  # role and content, as nearly always
        return tuple(messages), frozenset()
    for index, message in enumerate(messages):
        named = f"message {index + 1}{of}"
        said = {key: _is_trained(message, key, f"{place}: `{key}` of {named}") for key in _keys(message)}
        if len(set(said.values())) > 1:
            words = " and ".join(f"`{key}` {shortened(message[key])}" for key in said)
            raise UserError(f"{place}: {words} of {named} contradict each other; keep one of them.")
        if said and not any(said.values()):
            untrained.add(index)
        kept.append({key: value for key, value in message.items() if key not in said and not _is_nothing(key, value)})
    return tuple(kept), frozenset(untrained)


def _is_nothing(key: str, value: object) -> bool:
    """Whether the key is left out: templates ask whether one is there. An empty text stays, whose type they ask for."""
    return key not in ("role", "content") and is_empty(value) and not isinstance(value, str)


def _keys(message: Message) -> list[str]:
    return [key for key in (*TURN_WEIGHTS, *TURN_SWITCHES, *TURN_MASKS) if not is_empty(message.get(key))]


def _is_trained(message: Message, key: str, named: str) -> bool:
    value = message[key]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(
            f"{named} is {shortened(value)}, but it must be 0 or 1, or false or true: the loss has no weights between "
            f"them; correct it, or pass over it with --ignore-keys {key}."
        )
    if key in TURN_MASKS:
        value = not value
    if value and key not in TURN_WEIGHTS and message["role"] != "assistant":
        raise UserError(
            f"{named} asks for the {message['role']}'s turn to be trained, but only the assistant's are; remove it, or "
            f"pass over it with --ignore-keys {key} and train everything with --loss-on all."
        )
    return bool(value)
