"""Preference pairs: ``chosen`` and ``rejected``, with ``prompt`` or with the prompt inside both of them."""

from collections.abc import Mapping
from typing import Any

from hft_megatron.data.formats.record import Message, Preference, checked_messages, kind_of, text_of
from hft_megatron.errors import UserError


def parse_preference(row: Mapping[str, Any], place: str) -> Preference:
    """Three texts; or two lists of messages, with the prompt as a list, as one user's text, or as their beginning.

    Raises UserError where the parts are of the wrong or of different kinds. A record in which they are right, and the
    answers don't belong to one prompt, is a pair with a fault.
    """
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        return Preference(
            place=place,
            prompt=text_of(row, "prompt", place),
            chosen=text_of(row, "chosen", place),
            rejected=text_of(row, "rejected", place),
        )
    chosen = checked_messages(row["chosen"], place, key="chosen")
    rejected = checked_messages(row["rejected"], place, key="rejected")
    prompt, fault = row.get("prompt"), None
    if isinstance(prompt, list):
        shared = list(checked_messages(prompt, place, key="prompt"))
    elif prompt is not None and not isinstance(prompt, str):
        raise UserError(f"{place}: `prompt` is {kind_of(prompt)}, but it must be text or a list of messages.")
    elif isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        shared = [{"role": "user", "content": prompt}]
    else:
        shared, chosen, rejected = _split_off_prompt(chosen, rejected)
        fault = _fault_of_prompt(shared, prompt)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise UserError(f"{place}: the last message of `{key}` is the {answer[-1]['role']}'s, not the assistant's.")
    return Preference(place=place, prompt=tuple(shared), chosen=chosen, rejected=rejected, fault=fault)


def _split_off_prompt(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[list[Message], tuple[Message, ...], tuple[Message, ...]]:
    """What both conversations begin with, and the rest of each: at least the last message, also of equal ones."""
    most = min(len(chosen), len(rejected)) - 1
    common = next((turn for turn in range(most) if chosen[turn] != rejected[turn]), most)
    return list(chosen[:common]), chosen[common:], rejected[common:]


def _fault_of_prompt(shared: list[Message], prompt: str | None) -> str | None:
    if not shared:
        return "`chosen` and `rejected` begin differently, so they are no answers to one prompt"
    if prompt is not None and all(prompt != message["content"] for message in shared):
        return "`prompt` is none of the messages that `chosen` and `rejected` begin with"
    return None
