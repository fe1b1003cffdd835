"""What wins over every draw: frozen embedding and head, and the lists of units that always train or always rest."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from hft_megatron.errors import UserError
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import EMBEDDING_NAME, LM_HEAD_NAME, Unit


def apply_overrides(units: Sequence[Unit], selected: frozenset[str], policy: Policy) -> frozenset[str]:
    """``selected`` with the policy's freezes and lists applied.

    A pattern is ``fnmatch``'s, matched with case against a unit's Hugging Face name, alone or with ``.weight``. Raises
    ``UserError`` for a pattern that matches no unit and for a unit that two options contradict each other about.
    """
    names = [unit.name for unit in units]
    trains: dict[str, str] = {}
    rests = _frozen_outside(names, policy)
    for option, patterns, matched in (("--hft-train", policy.train, trains), ("--hft-freeze", policy.freeze, rests)):
        for pattern in patterns:
            for name in _matches(option, pattern, names):
                matched.setdefault(name, f"{option} {pattern}")
    both = next((name for name in names if name in trains and name in rests), None)
    if both is not None:
        raise UserError(
            f"{trains[both]} and {rests[both]} both match {both}: a unit either always trains or always rests; "
            "narrow one of the two."
        )
    return selected.union(trains).difference(rests)


def _frozen_outside(names: Sequence[str], policy: Policy) -> dict[str, str]:
    """The units that the switches freeze, with the option that does it."""
    tied = LM_HEAD_NAME not in names
    assert not tied or policy.freeze_embedding == policy.freeze_head, "the rules of the options refuse half of a tie"
    rests = {EMBEDDING_NAME: "--hft-freeze-embedding"} if policy.freeze_embedding else {}
    if policy.freeze_head and not tied:
        rests[LM_HEAD_NAME] = "--hft-freeze-head"
    return rests


def _matches(option: str, pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)]
    if found:
        return found
    bare = pattern.removesuffix(".weight")
    if fnmatchcase(LM_HEAD_NAME, bare):
        raise UserError(
            f"{option} {pattern}: the model's head is tied to its embedding; name {EMBEDDING_NAME} instead."
        )
    nearest = difflib.get_close_matches(bare, names, n=1, cutoff=0)[0]
    raise UserError(f"{option} {pattern} matches no unit of the model; the nearest is {nearest}.")
