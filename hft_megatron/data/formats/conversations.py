"""Conversations: ``messages`` as OpenAI and Hugging Face write them, and ShareGPT's ``conversations``."""

from collections.abc import Mapping, Sequence
from typing import Any

from hft_megatron.data.formats.record import (
    Chat,
    Message,
    chat,
    checked_messages,
    kind_of,
    list_within_text,
    optional_text_of,
)
from hft_megatron.errors import UserError

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's names of speakers; data sets made of it use Hugging Face's as well.

A ``function_call`` is what the assistant says and is trained as its text stands, where LLaMA-Factory would put it into
the form that a model's tools have: a data set that wants one has it in the text, or ``tool_calls`` in ``messages``.
"""


def parse_messages(row: Mapping[str, Any], place: str) -> Chat:
    """``{"messages": [{"role", "content"}]}``. Raises UserError naming the message that is wrong."""
    _check_layout(row["messages"], "messages", "role", "conversations", "from", place)
    return chat(place, checked_messages(row["messages"], place))


def parse_sharegpt(row: Mapping[str, Any], place: str) -> Chat:
    """``{"conversations": [{"from", "value"}]}``, with an optional ``system`` text, as ``messages``."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{place}: `conversations` is {kind_of(turns)}, but it must be a list of at least one turn"
            f"{list_within_text(turns)}."
        )
    _check_layout(turns, "conversations", "from", "messages", "role", place)
    messages = [sharegpt_message(turn, number, place) for number, turn in enumerate(turns, start=1)]
    return chat(place, with_system(row, messages, place))


def _check_layout(turns: object, key: str, name: str, other_key: str, other_name: str, place: str) -> None:
    """Raise UserError for turns that are all in the form of the other layout."""
    if not isinstance(turns, list) or not turns:
        return
    if all(isinstance(turn, dict) and other_name in turn and name not in turn for turn in turns):
        raise UserError(
            f"{place}: the turns of `{key}` have `{other_name}` and no `{name}`, which is the form of `{other_key}`; "
            f"read it with --data-keys {key}={other_key}."
        )


def with_system(row: Mapping[str, Any], messages: Sequence[Message], place: str) -> tuple[Message, ...]:
    """The messages behind the row's ``system`` text, where it has one, once. Raises UserError where they begin with
    another one."""
    system = optional_text_of(row, "system", place)
    if not system or (messages and messages[0]["role"] == "system" and messages[0]["content"] == system):
        return tuple(messages)
    if messages and messages[0]["role"] == "system":
        raise UserError(
            f"{place}: `system` is another text than the system message of the conversation; keep one of them."
        )
    return ({"role": "system", "content": system}, *messages)


def sharegpt_message(turn: object, number: int, place: str, *, key: str = "conversations") -> Message:
    """A turn of ``from`` and ``value`` as a message. Raises UserError naming it by its number within ``key``."""
    of = "" if key == "conversations" else f" of `{key}`"
    if not isinstance(turn, dict):
        raise UserError(
            f"{place}: turn {number}{of} is {kind_of(turn)}, but it must be an object with `from` and `value`."
        )
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        shown = repr(speaker[:40]) if isinstance(speaker, str) else kind_of(speaker) if "from" in turn else "missing"
        raise UserError(
            f"{place}: the `from` of turn {number}{of} is {shown}, but it must be one of {', '.join(SHAREGPT_ROLES)}."
        )
    if not isinstance(text, str):
        kind = kind_of(text) if "value" in turn else "missing"
        raise UserError(f"{place}: the `value` of turn {number}{of} is {kind}, but it must be text.")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    for key in ("role", "content"):
        if key in others:
            raise UserError(
                f"{place}: turn {number}{of} has `{key}` as well as `from` and `value`; keep one of the two forms."
            )
    return {"role": SHAREGPT_ROLES[speaker], "content": text, **others}
