"""Cuts pairs and completions where their prompt ends: what prompt and answers share is the prompt's, and stands once.

The rules follow TRL's ``extract_prompt`` where a prompt is missing. Unlike there, what a given prompt and both answers
begin with is taken off the answers, unless it is but a greeting, and a text is cut at a turn and not wherever its
letters begin to differ.
"""

import os.path
import re
from collections.abc import Sequence

from hft_megatron.data.formats.record import Message, Preference, PromptForm

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"
"""How a transcript such as hh-rlhf's begins its turns."""
_TURN = re.compile(f"{HUMAN_TURN}|{ASSISTANT_TURN}")
_CUES = (":", "\uff1a", "=", ">", "]")
"""What a prompt ends with that asks for an answer right behind it: a colon, an equals sign, a template's last token."""
_MOST_WORDS_OF_A_GREETING = 4
_BEGIN_DIFFERENTLY = "`chosen` and `rejected` begin differently, so they are no answers to one prompt"


def split_texts(place: str, prompt: str | None, chosen: str, rejected: str) -> Preference | None:
    """The pair of a prompt and two texts. None where there is no prompt, and no transcript to find it in."""
    asked = prompt or ""
    repeats = [_repeated(asked, answer) for answer in (chosen, rejected)]
    repeated = min(repeats, key=len)
    if repeated and _is_more_than_a_greeting(repeated):
        return _cut_texts(place, repeated, chosen, rejected, "stripped")
    shared = _transcript_prompt(chosen, rejected)
    if shared and (not asked.strip() or _is_turn_of(shared, asked)):
        return _cut_texts(place, shared, chosen, rejected, "stripped" if asked.strip() else "found")
    if prompt is not None:
        form: PromptForm = "in both answers" if all(repeats) else "in one answer" if any(repeats) else "given"
        return Preference(place=place, prompt=prompt, chosen=chosen, rejected=rejected, form=form)
    if ASSISTANT_TURN in chosen and ASSISTANT_TURN in rejected:
        return Preference(place=place, prompt="", chosen=chosen, rejected=rejected, fault=_BEGIN_DIFFERENTLY)
    return None


def split_completion(prompt: str, completion: str) -> tuple[str, str, bool]:
    """A prompt, what follows it, and whether the prompt was taken off the completion, which repeated it.

    A completion that is nothing but the prompt stays: it is an answer that gives a text back, as corrections may.
    """
    repeated = _repeated(prompt, completion)
    rest = completion[len(repeated) :]
    if repeated and rest.strip() and _is_more_than_a_greeting(repeated):
        return repeated, rest, True
    return prompt, completion, False


def _repeated(prompt: str, answer: str) -> str:
    """The prompt as the answer begins with it, without white space at its end where the answer has other there; empty
    where the answer doesn't."""
    forms = [prompt, prompt.rstrip()] if prompt.strip() else []
    return next((form for form in forms if _stands_in_front(form, answer)), "")


def _stands_in_front(prompt: str, answer: str) -> bool:
    """Whether the answer is the prompt and what follows it, and not a longer word, or a sentence that goes on."""
    rest = answer[len(prompt) :]
    return answer.startswith(prompt) and (not prompt[-1].isalnum() or not rest or rest[0].isspace())


def _is_more_than_a_greeting(prompt: str) -> bool:
    """Whether no answer begins with these words by itself, as one to "Hi" or "Good morning!" may.

    Those are left: what both answers begin with is learned of neither, and an answer without its first word would be
    another text.
    """
    ends_in_cue = prompt[-1].isspace() or prompt.endswith(_CUES)
    return ends_in_cue or "\n" in prompt or len(prompt.split()) > _MOST_WORDS_OF_A_GREETING


def _is_turn_of(transcript: str, asked: str) -> bool:
    """Whether it is one whole turn of the transcript or several, with or without the names of who speaks."""
    turns, mine = ([turn.strip() for turn in _TURN.split(f"\n\n{text.strip()}")] for text in (transcript, asked))
    mine = mine if mine[0] else mine[1:]
    return any(turns[at : at + len(mine)] == mine for at in range(len(turns)))


def _transcript_prompt(chosen: str, rejected: str) -> str:
    """What both transcripts begin with, up to the last turn of the assistant's that both begin; empty without one."""
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
    before, turn, _ = shared.rpartition(ASSISTANT_TURN)
    return before + turn


def _cut_texts(place: str, prompt: str, chosen: str, rejected: str, form: PromptForm) -> Preference:
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    fault = None
    if prompt.endswith(ASSISTANT_TURN) and any(HUMAN_TURN in answer for answer in answers):
        fault = "the answers differ before the last turn of the assistant's, and a turn of the human's is in one"
    return Preference(place=place, prompt=prompt, chosen=answers[0], rejected=answers[1], form=form, fault=fault)


def split_messages(
    place: str, prompt: str | Sequence[Message] | None, chosen: Sequence[Message], rejected: Sequence[Message]
) -> Preference:
    """The pair of a prompt and two conversations of at least one message each; a prompt of text is the user's."""
    answers_begin = chosen[0]["role"] == rejected[0]["role"] == "assistant"
    if isinstance(prompt, str) and answers_begin:
        prompt = [{"role": "user", "content": prompt}]
    shared = _common(chosen, rejected)
    if prompt is None or isinstance(prompt, str):
        fault = None if shared else _BEGIN_DIFFERENTLY
        if prompt and shared and all(prompt != message["content"] for message in shared):
            fault = "`prompt` is none of the messages that `chosen` and `rejected` begin with"
        return _cut(place, shared, len(shared), chosen, rejected, "found", fault)
    # First, because a person may ask the same thing twice.
    if shared[-len(prompt) :] == list(prompt):
        return _cut(place, shared, len(shared), chosen, rejected, "stripped")
    repeated = [_overlap(prompt, answer) for answer in (chosen, rejected)]
    if min(repeated) > 0:
        return _cut(place, prompt, min(repeated), chosen, rejected, "stripped")
    if max(repeated) > 0:
        one, other = ("chosen", "rejected") if repeated[0] else ("rejected", "chosen")
        fault = f"`{one}` repeats the prompt, and `{other}` doesn't"
        return _cut(place, prompt, 0, chosen, rejected, "in one answer", fault)
    if any(shared[at : at + len(prompt)] == list(prompt) for at in range(len(shared))):
        return _cut(place, shared, len(shared), chosen, rejected, "stripped")
    return _cut(place, prompt, 0, chosen, rejected, "given")


def split_completion_messages(
    prompt: Sequence[Message], completion: Sequence[Message]
) -> tuple[list[Message], list[Message], bool]:
    """A prompt, the messages that follow it, and whether the completion repeated it: the end of the prompt, or a whole
    conversation that has the prompt in it."""
    if size := _overlap(prompt, completion):
        return list(prompt), list(completion[size:]), True
    if completion[0]["role"] != "assistant":
        for end in range(len(prompt), len(completion)):
            if list(completion[end - len(prompt) : end]) == list(prompt):
                return list(completion[:end]), list(completion[end:]), True
    return list(prompt), list(completion), False


def _cut(
    place: str,
    prompt: Sequence[Message],
    start: int,
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    form: PromptForm,
    fault: str | None = None,
) -> Preference:
    return Preference(
        place=place,
        prompt=tuple(prompt),
        chosen=tuple(chosen[start:]),
        rejected=tuple(rejected[start:]),
        form=form,
        fault=fault,
    )


def _common(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """What both conversations begin with, without the last message of either, also of equal ones."""
    most = min(len(chosen), len(rejected)) - 1
    common = next((turn for turn in range(most) if chosen[turn] != rejected[turn]), most)
    return list(chosen[:common])


def _overlap(prompt: Sequence[Message], answer: Sequence[Message]) -> int:
    """Messages at the end of the prompt that the answer begins with again, and doesn't consist of; the most."""
    sizes = range(min(len(prompt), len(answer) - 1), 0, -1)
    return next((size for size in sizes if list(prompt[-size:]) == list(answer[:size])), 0)
