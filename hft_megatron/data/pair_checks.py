"""What makes a preference pair one that nothing can be learned of."""

from collections.abc import Sequence

import numpy as np

from hft_megatron.data.faults import RecordRefused
from hft_megatron.data.fitting import ExampleRules
from hft_megatron.data.formats.record import Message, Preference
from hft_megatron.data.stores import Encoded


class BadPair(Exception):
    """A pair of which nothing can be learned; the message is a clause."""


def check_record(pair: Preference) -> None:
    """Raise BadPair for a fault that the record itself shows."""
    if pair.fault is not None:
        raise BadPair(pair.fault)
    for key, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _is_empty(answer):
            raise BadPair(f"the answer in `{key}` is empty")
    if pair.chosen == pair.rejected:
        raise BadPair("`chosen` and `rejected` are the same")


def _is_empty(answer: str | Sequence[Message]) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not (answer[-1]["content"] or "").strip() and answer[-1].keys() <= {"role", "content"}


def check_room(halves: Sequence[Encoded], rules: ExampleRules) -> None:
    """Raise BadPair where nothing trained of a half is within the sequence length."""
    for _, mask in halves:
        if not mask[1 : rules.seq_length + 1].any():
            raise BadPair("the prompt leaves no room for an answer within --seq-length")


def check_length(positions: int, place: str, rules: ExampleRules) -> None:
    """Raise RecordRefused for a pair whose longer half is too long under ``error``."""
    if positions > rules.seq_length and rules.long_examples == "error":
        raise RecordRefused(
            place,
            f"the prompt and an answer have {{}} positions, but --seq-length is {rules.seq_length}; choose "
            f"--long-examples drop or truncate, or raise it where the model has more positions.",
            positions,
        )


def check_halves(halves: Sequence[Encoded]) -> None:
    """Raise BadPair where the halves, cut to the sequence length, teach nothing."""
    prompts = []
    for ids, mask in halves:
        prompts.append(ids[: int(np.argmax(mask))])
    if not np.array_equal(prompts[0], prompts[1]):
        raise BadPair("the two answers follow different tokens: their prompts differ, or the chat template makes them")
    if np.array_equal(halves[0][0], halves[1][0]):
        raise BadPair("`chosen` and `rejected` have the same tokens within --seq-length")
