"""Text and what follows it, verbatim: ``prompt``/``completion``, NeMo's ``input``/``output``, TRACE, plain ``text``.

A prompt that its completion repeats is taken off it, as it is off the answers of pairs.
"""

from collections.abc import Mapping
from typing import Any

from hft_megatron.data.formats.record import (
    Chat,
    Completion,
    chat,
    check_seam,
    checked_messages,
    kind_of,
    text_of,
)
from hft_megatron.data.formats.shared_beginning import split_completion, split_completion_messages
from hft_megatron.errors import UserError


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
