"""Prompts and completions, of which the completion is learned: as texts, or as lists of messages.

A prompt that its completion repeats is removed from it, as from the answers of pairs, unless it is only a greeting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.data.formats.conversations import (
    NOTHING,
    Chat,
    Message,
    PassedOver,
    chat,
    check_seam,
    checked_messages,
    kind_of,
    text_of,
)
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and its completion, both as they are: nothing is put between them."""

    place: str
    prompt: str
    completion: str
    repeated: bool = False
    """True if the completion repeated the prompt, which was removed from it."""
    keys: PassedOver = NOTHING


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


def split_completion(prompt: str, completion: str) -> tuple[str, str, bool]:
    """A prompt, its completion, and whether the prompt was removed from the completion, which repeated it.

    A completion that equals the prompt stays: it is an answer that returns a text, as corrections may.
    """
    repeated = repeated_prompt(prompt, completion)
    rest = completion[len(repeated) :]
    if repeated and rest.strip() and is_more_than_a_greeting(repeated):
        return repeated, rest, True
    return prompt, completion, False


def split_completion_messages(
    prompt: Sequence[Message], completion: Sequence[Message]
) -> tuple[list[Message], list[Message], bool]:
    """A prompt, the messages after it, and whether the completion repeated it: the end of the prompt, or a whole
    conversation that contains the prompt."""
    if size := overlap(prompt, completion):
        return list(prompt), list(completion[size:]), True
    if completion[0]["role"] != "assistant":
        for end in range(len(prompt), len(completion)):
            if list(completion[end - len(prompt) : end]) == list(prompt):
                return list(completion[:end]), list(completion[end:]), True
    return list(prompt), list(completion), False


_CUES = (":", "\uff1a", "=", ">", "]")
"""Endings of a prompt that ask for an answer right after them: a colon, an equals sign, a template's last token."""
_MOST_WORDS_OF_A_GREETING = 4


def repeated_prompt(prompt: str, answer: str) -> str:
    """The prompt as the answer begins with it, without trailing white space if the answer has other white space
    there; empty if the answer doesn't begin with it."""
    forms = [prompt, prompt.rstrip()] if prompt.strip() else []
    return next((form for form in forms if _stands_in_front(form, answer)), "")


def _stands_in_front(prompt: str, answer: str) -> bool:
    """True if the answer is the prompt and a continuation, and not a longer word or a longer sentence."""
    rest = answer[len(prompt) :]
    return answer.startswith(prompt) and (not prompt[-1].isalnum() or not rest or rest[0].isspace())


def is_more_than_a_greeting(prompt: str) -> bool:
    """True unless an answer may begin with these words by itself, as one to "Hi" or "Good morning!" may.

    Such a prompt stays in the answers: a common beginning is learned from neither, and an answer without its first word
    would be another text.
    """
    ends_in_cue = prompt[-1].isspace() or prompt.endswith(_CUES)
    return ends_in_cue or "\n" in prompt or len(prompt.split()) > _MOST_WORDS_OF_A_GREETING


def overlap(prompt: Sequence[Message], answer: Sequence[Message]) -> int:
    """Largest number of messages at the end of the prompt that the answer repeats at its beginning and exceeds."""
    sizes = range(min(len(prompt), len(answer) - 1), 0, -1)
    return next((size for size in sizes if list(prompt[-size:]) == list(answer[:size])), 0)
