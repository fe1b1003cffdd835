"""Text and what follows it, verbatim: ``prompt``/``completion``, NeMo's ``input``/``output``, TRACE, plain ``text``."""

from collections.abc import Mapping
from typing import Any

from hft_megatron.data.formats.record import Chat, Completion, chat, checked_messages, text_of


def parse_prompt_completion(row: Mapping[str, Any], place: str) -> Completion | Chat:
    """``{"prompt", "completion"}``: two texts, or two lists of messages as in TRL, of which the second is learned."""
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        prompt = checked_messages(row["prompt"], place, key="prompt")
        completion = checked_messages(row["completion"], place, key="completion")
        chat(place, completion)
        return Chat(place=place, messages=(*prompt, *completion), given=len(prompt))
    return Completion(place=place, prompt=text_of(row, "prompt", place), completion=text_of(row, "completion", place))


def parse_input_output(row: Mapping[str, Any], place: str) -> Completion:
    """``{"input", "output"}``."""
    return Completion(place=place, prompt=text_of(row, "input", place), completion=text_of(row, "output", place))


def parse_trace(row: Mapping[str, Any], place: str) -> Completion:
    """TRACE's ``{"prompt", "answer"}``, which its own code joins with nothing between them."""
    return Completion(place=place, prompt=text_of(row, "prompt", place), completion=text_of(row, "answer", place))


def parse_text(row: Mapping[str, Any], place: str) -> Completion:
    """``{"text"}``, all of which is trained: a completion of nothing."""
    return Completion(place=place, prompt="", completion=text_of(row, "text", place))
