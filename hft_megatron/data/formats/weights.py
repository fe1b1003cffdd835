"""Which turns a record itself says are not to be trained: ``weight`` 0, ``train`` false and the like.

The options of a run say what is trained of all records; a turn's own key can only take it out.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hft_megatron.data.formats.keys import TURN_MASKS, TURN_SWITCHES, TURN_WEIGHTS, is_empty
from hft_megatron.data.formats.record import Chat, Completion, Message, Preference, Record, shortened
from hft_megatron.errors import UserError


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
