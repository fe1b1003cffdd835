"""Formats of supervised records: Alpaca's, prompt and completion, and conversations.

A prompt that its completion repeats is taken off it, as it is off the answers of pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hft_megatron.data.formats.record import (
    Chat,
    Completion,
    Message,
    chat,
    check_seam,
    checked_messages,
    kind_of,
    list_within_text,
    optional_text_of,
    text_of,
)
from hft_megatron.data.formats.shared_beginning import split_completion, split_completion_messages
from hft_megatron.errors import UserError


def parse_alpaca(row: Mapping[str, Any], place: str) -> Chat:
    """The user says the instruction and, on the next line, the input, or the one of them that isn't empty; the output
    is the answer.

    ``system`` (a text) and ``history`` (earlier pairs of question and answer) are optional, as in LLaMA-Factory.
    """
    prompt = alpaca_prompt(row, place)
    return chat(place, [*prompt, {"role": "assistant", "content": text_of(row, "output", place)}])


def alpaca_prompt(row: Mapping[str, Any], place: str) -> list[Message]:
    """The messages that the output answers, the user's with the instruction last."""
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


def parse_prompt_completion(row: Mapping[str, Any], place: str) -> Completion | Chat:
    """``{"prompt", "completion"}``: two texts, or two lists of messages as in TRL, of which the second is learned."""
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        prompt = checked_messages(row["prompt"], place, key="prompt")
        completion = checked_messages(row["completion"], place, key="completion")
        asked, rest, repeated = split_completion_messages(prompt, completion)
        chat(place, rest)
        if not repeated:
            check_seam(asked, rest, place, "prompt", "completion")
        return Chat(place=place, messages=(*asked, *rest), given=len(asked), repeated=repeated)
    if isinstance(row["prompt"], list) != isinstance(row["completion"], list):
        raise UserError(
            f"{place}: `prompt` is {kind_of(row['prompt'])} and `completion` is {kind_of(row['completion'])}; write "
            f"both alike, as texts or as lists of messages."
        )
    return _completion(row, place, "prompt", "completion")


def parse_input_output(row: Mapping[str, Any], place: str) -> Completion:
    """``{"input", "output"}``."""
    return _completion(row, place, "input", "output")


def parse_trace(row: Mapping[str, Any], place: str) -> Completion:
    """TRACE's ``{"prompt", "answer"}``, which its own code joins with nothing between them."""
    return _completion(row, place, "prompt", "answer")


def parse_text(row: Mapping[str, Any], place: str) -> Completion:
    """``{"text"}``, all of which is trained: a completion of nothing."""
    return Completion(place=place, prompt="", completion=text_of(row, "text", place))


def _completion(row: Mapping[str, Any], place: str, asked: str, answered: str) -> Completion:
    prompt, completion, repeated = split_completion(text_of(row, asked, place), text_of(row, answered, place))
    return Completion(place=place, prompt=prompt, completion=completion, repeated=repeated)


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
