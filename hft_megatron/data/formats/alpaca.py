"""Alpaca's ``instruction``, ``input`` and ``output``, as a conversation of one turn, or of more with ``history``."""

from collections.abc import Mapping
from typing import Any

from hft_megatron.data.formats.record import Chat, Message, chat, kind_of, optional_text_of, text_of
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
