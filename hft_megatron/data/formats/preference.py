"""Preference pairs: ``chosen`` and ``rejected``, and a prompt in any of the forms that data sets have it in."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hft_megatron.data.formats.record import (
    Message,
    Preference,
    check_seam,
    checked_messages,
    kind_of,
    optional_text_of,
)
from hft_megatron.data.formats.shared_beginning import split_messages, split_texts
from hft_megatron.data.formats.supervised import SHAREGPT_ROLES, alpaca_prompt, sharegpt_message, with_system
from hft_megatron.errors import UserError

PROMPT_NAMES = ("prompt", "question", "query", "problem")
COMPLETION_NAMES = ("completion", "answer", "response", "solution")
"""What GSM8K, MetaMath and others call the halves of ``prompt-completion``. No format, since as often they mean a
conversation."""


def only_one_of(names: Iterable[str], keys: Iterable[str]) -> str | None:
    """The one of ``names`` that is among ``keys``; None where none or several are."""
    found = set(names) & set(keys)
    return found.pop() if len(found) == 1 else None


_Prompt = str | tuple[Message, ...] | None


def parse_preference(row: Mapping[str, Any], place: str) -> Preference:
    """Answers are two texts, two messages, or two lists of them. The prompt is ``prompt`` (text or messages), what both
    answers begin with, LLaMA-Factory's ``conversations``, or Alpaca's ``instruction``, ``input`` and ``history``.

    A ``system`` text stands in front of the messages. Raises UserError where the parts are of the wrong or of different
    kinds. A record in which they are right, and the answers don't belong to one prompt, is a pair with a fault.
    """
    chosen, rejected = _answer(row, "chosen", place), _answer(row, "rejected", place)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            f"{place}: `chosen` is {kind_of(row['chosen'])} and `rejected` is {kind_of(row['rejected'])}; write both "
            f"alike."
        )
    prompt = _prompt(row, place)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None or isinstance(prompt, str):
            return _pair_of_texts(row, place, prompt, chosen, rejected)
        chosen, rejected = (({"role": "assistant", "content": text},) for text in (chosen, rejected))
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise UserError(f"{place}: the last message of `{key}` is the {answer[-1]['role']}'s, not the assistant's.")
    if prompt is None and chosen[0]["role"] == rejected[0]["role"] == "assistant" and chosen[0] != rejected[0]:
        raise UserError(
            f"{place}: `prompt` is missing, and both conversations begin with the assistant; {_name_it(row)}."
        )
    pair = split_messages(place, prompt, chosen, rejected)
    assert not isinstance(pair.prompt, str)
    if pair.form == "given":
        for answer_key, answer in (("chosen", chosen), ("rejected", rejected)):
            check_seam(pair.prompt, answer, place, prompt_keys(row)[0], answer_key)
    return replace(pair, prompt=with_system(row, pair.prompt, place))


def _pair_of_texts(row: Mapping[str, Any], place: str, prompt: str | None, chosen: str, rejected: str) -> Preference:
    if optional_text_of(row, "system", place):
        raise UserError(
            f"{place}: `system` has no place beside a prompt and answers of text; make them a conversation with "
            f"--data-keys {_prompt_name(row)}=instruction, or remove it."
        )
    pair = split_texts(place, prompt, chosen, rejected)
    if pair is None:
        raise UserError(
            f"{place}: `prompt` is missing, and neither text has turns (\\n\\nHuman: and \\n\\nAssistant:) to find it "
            f"by; {_name_it(row)}."
        )
    return pair


def _name_it(row: Mapping[str, Any]) -> str:
    return f"name the key that holds it with --data-keys {_prompt_name(row)}=prompt, or write a `prompt`"


def _prompt_name(row: Mapping[str, Any]) -> str:
    return only_one_of(PROMPT_NAMES, row) or "KEY"


def _answer(row: Mapping[str, Any], key: str, place: str) -> str | tuple[Message, ...]:
    value = row[key]
    return value if isinstance(value, str) else _messages([value] if isinstance(value, dict) else value, key, place)


def prompt_keys(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the row that are read next to its answers: those of the first form there is of a prompt.

    A conversation is one only where the answers begin with the assistant: others hold their prompts, and the
    conversation beside them is often one of them.
    """
    if "prompt" in row:
        return "prompt", "system"
    for key in ("conversations", "messages"):
        if key in row and is_answer_alone(row["chosen"]):
            return key, "system"
    return ("instruction", "input", "history", "system") if "instruction" in row else ("system",)


def is_answer_alone(answer: object) -> bool:
    """Whether an answer doesn't begin with its prompt, as far as roles say: a text may."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    if not isinstance(first, dict):
        return isinstance(first, str)
    return first.get("role") == "assistant" or SHAREGPT_ROLES.get(str(first.get("from"))) == "assistant"


def _prompt(row: Mapping[str, Any], place: str) -> _Prompt:
    key, *_ = prompt_keys(row)
    if key == "system":
        return None
    if key == "instruction":
        return tuple(alpaca_prompt({key: value for key, value in row.items() if key != "system"}, place))
    if key == "prompt" and isinstance(row[key], str):
        return str(row[key])
    if key == "prompt" and not isinstance(row[key], list):
        raise UserError(f"{place}: `prompt` is {kind_of(row[key])}, but it must be text or a list of messages.")
    return _messages(row[key], key, place)


def _messages(value: object, key: str, place: str) -> tuple[Message, ...]:
    """Messages of ``role`` and ``content``, or ShareGPT's turns of ``from`` and ``value``."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "from" in turn for turn in value):
        return tuple(sharegpt_message(turn, number, place, key=key) for number, turn in enumerate(value, start=1))
    return checked_messages(value, place, key=key)
