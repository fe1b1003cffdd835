"""Conversations: ``messages``, ShareGPT's turns and Alpaca's records, and turns' own keys about training.

The options of a run decide what is trained in all records; a turn's own key can only exclude it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.data.formats.keys import TURN_MASKS, TURN_SWITCHES, TURN_WEIGHTS, is_empty
from hft_megatron.errors import UserError

ROLES = ("system", "user", "assistant", "developer", "tool", "ipython", "function", "observation")
"""Roles of published chat templates. A run's template decides when it renders them which of them it has."""
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Keys of one record, or of its messages, that are not read."""

    unread: tuple[str, ...] = ()
    """Keys that are harmless, or that no known trainer reads."""
    ignored: tuple[str, ...] = ()
    """Keys named by --ignore-keys."""


NOTHING = PassedOver()


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; keys of a message other than ``role`` and ``content`` are for the chat template."""

    place: str
    """``file:line`` or the like, for errors."""
    messages: tuple[Message, ...]
    given: int = 0
    """Messages at the beginning that are a prompt: the assistant's turns there are not learned."""
    untrained: frozenset[int] = frozenset()
    """Indices of messages that the record itself excludes from training."""
    repeated: bool = False
    """True if the completion repeated the prompt, which was removed from it."""
    keys: PassedOver = NOTHING


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

A ``function_call`` is a turn of the assistant and trained as its text is, where LLaMA-Factory would convert it to the
tool format of a model: a data set that wants one has it in the text, or ``tool_calls`` in ``messages``.
"""


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


def _check_layout(turns: object, key: str, name: str, other_key: str, other_name: str, place: str) -> None:
    """Raise UserError for turns that are all in the form of the other layout."""
    if not isinstance(turns, list) or not turns:
        return
    if all(isinstance(turn, dict) and other_name in turn and name not in turn for turn in turns):
        raise UserError(
            f"{place}: the turns of `{key}` have `{other_name}` but no `{name}`, which is the form of `{other_key}`; "
            f"read it with --data-keys {key}={other_key}."
        )


def parse_alpaca(row: Mapping[str, Any], place: str) -> Chat:
    """The user's message is the instruction and, on the next line, the input, or the one of them that isn't empty; the
    output is the answer.

    ``system`` (a text) and ``history`` (earlier pairs of question and answer) are optional, as in LLaMA-Factory.
    """
    prompt = alpaca_prompt(row, place)
    return chat(place, [*prompt, {"role": "assistant", "content": text_of(row, "output", place)}])


def alpaca_prompt(row: Mapping[str, Any], place: str) -> list[Message]:
    """The messages before the output, the user's with the instruction last."""
    instruction = text_of(row, "instruction", place)
    given = optional_text_of(row, "input", place)
    system = optional_text_of(row, "system", place)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in _history(row.get("history"), place):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "\n".join(text for text in (instruction, given) if text)})
    return messages


def _history(pairs: object, place: str) -> list[tuple[str, str]]:
    if pairs is None:
        return []
    if not isinstance(pairs, list):
        raise UserError(f"{place}: `history` is {kind_of(pairs)}, but it must be a list of pairs of texts.")
    for number, pair in enumerate(pairs, start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(f"{place}: entry {number} of `history` must be a list of two texts, question and answer.")
    return [(question, answer) for question, answer in pairs]


def with_system(row: Mapping[str, Any], messages: Sequence[Message], place: str) -> tuple[Message, ...]:
    """The messages after the row's ``system`` text, where it has one, once. Raises UserError where they begin with
    another one."""
    system = optional_text_of(row, "system", place)
    if not system or (messages and messages[0]["role"] == "system" and messages[0]["content"] == system):
        return tuple(messages)
    if messages and messages[0]["role"] == "system":
        raise UserError(f"{place}: `system` differs from the system message of the conversation; keep one of them.")
    return ({"role": "system", "content": system}, *messages)


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
        # OpenAI writes a null beside a call: the template gets it unchanged.
        is_call_alone = content is None and any(message.get(key) for key in ("tool_calls", "function_call"))
        if not isinstance(content, str) and not is_call_alone:
            kind = kind_of(content) if "content" in message else "missing"
            raise UserError(f"{place}: the `content` of message {number}{of} is {kind}, but it must be text.")
        checked.append({**message, "content": content})
    return tuple(checked)


def _joined_parts(parts: Sequence[object], whose: str) -> str:
    """The text of OpenAI's and TRL's ``{"type": "text", "text"}``, with nothing between the parts, as templates print
    them. Raises UserError for a part of another type, or with further keys."""
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
    """A conversation to learn from. Raises UserError if no turn is the assistant's."""
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place}: the conversation has no assistant turn, so nothing can be learned; remove it.")
    return Chat(place=place, messages=tuple(messages))


def check_seam(prompt: Sequence[Message], answer: Sequence[Message], place: str, key: str, answer_key: str) -> None:
    """Raise UserError where an answer would be a second turn of the assistant in a row after the prompt."""
    if prompt and prompt[-1]["role"] == answer[0]["role"] == "assistant":
        raise UserError(
            f"{place}: the last message of `{key}` is the assistant's, and `{answer_key}` begins with the assistant, "
            f"too, which makes two turns in a row; remove that message from `{key}`, and put its text before "
            f"`{answer_key}` if the answer continues it."
        )


def text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under ``key``. Raises UserError where it is missing or something else."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{place}: `{key}` is {kind_of(value) if key in row else 'missing'}, but it must be text.")
    return value


def optional_text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under ``key``, empty where it is missing or null."""
    return "" if row.get(key) is None else text_of(row, key, place)


def kind_of(value: object) -> str:
    """JSON's name of the value's type, with its article; Parquet has more types than JSON."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names: dict[type, str] = {bool: "a truth value", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def list_within_text(value: object) -> str:
    """Advice where a list was asked for and ``value`` is a text that holds one; empty for anything else."""
    is_json = isinstance(value, str) and value.lstrip().startswith("[")
    return "; the text holds JSON: write the list itself, in a file of JSON Lines" if is_json else ""


def shortened(value: object) -> str:
    """The value in Python's notation, cut to 40 characters."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def weighed_messages(
    messages: Sequence[Message], place: str, of: str = ""
) -> tuple[tuple[Message, ...], frozenset[int]]:
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
    """True if the key is left out: templates ask whether one is there. An empty text stays, because of its type."""
    return key not in ("role", "content") and is_empty(value) and not isinstance(value, str)


def _keys(message: Message) -> list[str]:
    return [key for key in (*TURN_WEIGHTS, *TURN_SWITCHES, *TURN_MASKS) if not is_empty(message.get(key))]


def _is_trained(message: Message, key: str, named: str) -> bool:
    value = message[key]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(
            f"{named} is {shortened(value)}, but it must be 0 or 1, or false or true: the loss has no weights between "
            f"them; correct it, or ignore it with --ignore-keys {key}."
        )
    if key in TURN_MASKS:
        value = not value
    if value and key not in TURN_WEIGHTS and message["role"] != "assistant":
        raise UserError(
            f"{named} asks to train the {message['role']}'s turn, but only the assistant's turns are trained; remove "
            f"it, or ignore it with --ignore-keys {key} and train everything with --loss-on all."
        )
    return bool(value)
