"""Preference pairs: ``chosen`` and ``rejected``, and a prompt in any of the forms that data sets have it in.

The common part of a prompt and both answers is the prompt's, and kept once. The rules follow TRL's ``extract_prompt``
where a prompt is missing. Unlike there, a given prompt that both answers begin with is removed from the answers, unless
it is only a greeting, and a text is cut at a turn and not wherever its letters begin to differ.
"""

import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hft_megatron.data.formats.completions import is_more_than_a_greeting, overlap, repeated_prompt
from hft_megatron.data.formats.conversations import (
    NOTHING,
    SHAREGPT_ROLES,
    Message,
    PassedOver,
    alpaca_prompt,
    check_seam,
    checked_messages,
    kind_of,
    optional_text_of,
    sharegpt_message,
    weighed_messages,
    with_system,
)
from hft_megatron.errors import UserError

PromptForm = Literal["given", "stripped", "found", "in one answer", "in both answers"]
"""Place of a pair's prompt: on its own; on its own and again before both answers, where it was removed; before both
answers alone; on its own and again before one answer, which was left as it is; on its own and again before both, which
were left because answers may begin with such a prompt themselves."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt and two answers, of which the first is preferred; all three text, or all three messages."""

    place: str
    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    form: PromptForm = "given"
    problem: str | None = None
    """Reason why these are not two answers to one prompt, as a clause; None where they are."""
    keys: PassedOver = NOTHING


PROMPT_NAMES = ("prompt", "question", "query", "problem")
COMPLETION_NAMES = ("completion", "answer", "response", "solution")
"""Names that GSM8K, MetaMath and others give the halves of ``prompt-completion``. Not a format, since they mean a
conversation as often."""


def only_one_of(names: Iterable[str], keys: Iterable[str]) -> str | None:
    """The single one of ``names`` that is among ``keys``; None where none or several are."""
    found = set(names) & set(keys)
    return found.pop() if len(found) == 1 else None


_Prompt = str | tuple[Message, ...] | None


def parse_preference(row: Mapping[str, Any], place: str) -> Preference:
    """Answers are two texts, two messages, or two lists of them. The prompt is ``prompt`` (text or messages), the
    common beginning of both answers, LLaMA-Factory's ``conversations``, or Alpaca's ``instruction``, ``input`` and
    ``history``.

    A ``system`` text comes before the messages. Raises UserError where the parts have wrong or different types. If only
    the answers don't belong to one prompt, the record is a pair with a problem.
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
            f"{place}: `system` cannot be used with a prompt and answers of text; make them a conversation with "
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
    """The keys of the row that are read beside its answers: those of the first form of a prompt that it has.

    A conversation counts only where the answers begin with the assistant: other answers hold their prompts, and the
    conversation beside them is often one of them.
    """
    if "prompt" in row:
        return "prompt", "system"
    for key in ("conversations", "messages"):
        if key in row and is_answer_alone(row["chosen"]):
            return key, "system"
    return ("instruction", "input", "history", "system") if "instruction" in row else ("system",)


def is_answer_alone(answer: object) -> bool:
    """True if an answer doesn't begin with its prompt, as far as roles show it: a text may."""
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


HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"
"""Beginnings of turns in a transcript such as hh-rlhf's."""
_TURN = re.compile(f"{HUMAN_TURN}|{ASSISTANT_TURN}")
_BEGIN_DIFFERENTLY = "`chosen` and `rejected` begin differently, so they don't answer one prompt"


def split_texts(place: str, prompt: str | None, chosen: str, rejected: str) -> Preference | None:
    """The pair of a prompt and two texts. None where there is no prompt, and no transcript to find it in."""
    asked = prompt or ""
    repeats = [repeated_prompt(asked, answer) for answer in (chosen, rejected)]
    repeated = min(repeats, key=len)
    if repeated and is_more_than_a_greeting(repeated):
        return _cut_texts(place, repeated, chosen, rejected, "stripped")
    shared = _transcript_prompt(chosen, rejected)
    if shared and (not asked.strip() or _is_turn_of(shared, asked)):
        return _cut_texts(place, shared, chosen, rejected, "stripped" if asked.strip() else "found")
    if prompt is not None:
        form: PromptForm = "in both answers" if all(repeats) else "in one answer" if any(repeats) else "given"
        return Preference(place=place, prompt=prompt, chosen=chosen, rejected=rejected, form=form)
    if ASSISTANT_TURN in chosen and ASSISTANT_TURN in rejected:
        return Preference(place=place, prompt="", chosen=chosen, rejected=rejected, problem=_BEGIN_DIFFERENTLY)
    return None


def _is_turn_of(transcript: str, asked: str) -> bool:
    """True if ``asked`` is one or several whole turns of the transcript, with or without the speakers' names."""
    turns, mine = ([turn.strip() for turn in _TURN.split(f"\n\n{text.strip()}")] for text in (transcript, asked))
    mine = mine if mine[0] else mine[1:]
    return any(turns[at : at + len(mine)] == mine for at in range(len(turns)))


def _transcript_prompt(chosen: str, rejected: str) -> str:
    """The common beginning of both transcripts, up to the last assistant's turn that both begin; empty without one."""
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
    before, turn, _ = shared.rpartition(ASSISTANT_TURN)
    return before + turn


def _cut_texts(place: str, prompt: str, chosen: str, rejected: str, form: PromptForm) -> Preference:
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    problem = None
    if prompt.endswith(ASSISTANT_TURN) and any(HUMAN_TURN in answer for answer in answers):
        problem = "the answers differ before the last turn of the assistant's, and a turn of the human's is in one"
    return Preference(place=place, prompt=prompt, chosen=answers[0], rejected=answers[1], form=form, problem=problem)


def split_messages(
    place: str, prompt: str | Sequence[Message] | None, chosen: Sequence[Message], rejected: Sequence[Message]
) -> Preference:
    """The pair of a prompt and two conversations of at least one message each; a prompt of text is the user's."""
    answers_begin = chosen[0]["role"] == rejected[0]["role"] == "assistant"
    if isinstance(prompt, str) and answers_begin:
        prompt = [{"role": "user", "content": prompt}]
    shared = _common(chosen, rejected)
    if prompt is None or isinstance(prompt, str):
        problem = None if shared else _BEGIN_DIFFERENTLY
        if prompt and shared and all(prompt != message["content"] for message in shared):
            problem = "`prompt` is none of the messages that `chosen` and `rejected` begin with"
        return _cut(place, shared, len(shared), chosen, rejected, "found", problem)
    # First, because a person may ask the same thing twice.
    if shared[-len(prompt) :] == list(prompt):
        return _cut(place, shared, len(shared), chosen, rejected, "stripped")
    repeated = [overlap(prompt, answer) for answer in (chosen, rejected)]
    if min(repeated) > 0:
        return _cut(place, prompt, min(repeated), chosen, rejected, "stripped")
    if max(repeated) > 0:
        one, other = ("chosen", "rejected") if repeated[0] else ("rejected", "chosen")
        problem = f"`{one}` repeats the prompt, and `{other}` doesn't"
        return _cut(place, prompt, 0, chosen, rejected, "in one answer", problem)
    if any(shared[at : at + len(prompt)] == list(prompt) for at in range(len(shared))):
        return _cut(place, shared, len(shared), chosen, rejected, "stripped")
    return _cut(place, prompt, 0, chosen, rejected, "given")


def _cut(
    place: str,
    prompt: Sequence[Message],
    start: int,
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    form: PromptForm,
    problem: str | None = None,
) -> Preference:
    return Preference(
        place=place,
        prompt=tuple(prompt),
        chosen=tuple(chosen[start:]),
        rejected=tuple(rejected[start:]),
        form=form,
        problem=problem,
    )


def _common(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """The common beginning of both conversations, without the last message of either, also of equal ones."""
    most = min(len(chosen), len(rejected)) - 1
    common = next((turn for turn in range(most) if chosen[turn] != rejected[turn]), most)
    return list(chosen[:common])


def weighed_pair(pair: Preference) -> Preference:
    """The pair, whose prompt is never trained and whose answers are compared whole."""
    parts: dict[str, Any] = {}
    for name, part in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(part, str):
            continue
        parts[name], untrained = weighed_messages(part, pair.place, of=f" of `{name}`")
        answers = [number for number in sorted(untrained) if part[number]["role"] == "assistant"]
        if name != "prompt" and answers:
            raise UserError(
                f"{pair.place}: message {answers[0] + 1} of `{name}` is not to be trained, but the answers of a pair "
                f"are compared as a whole; remove that key, or ignore it with --ignore-keys."
            )
    return replace(pair, **parts)
