"""The units that train in a round: a rule's selection, the rotation over rounds, and the overrides of both."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from hft_megatron.errors import UserError
from hft_megatron.hft.policy import Draw, Policy
from hft_megatron.hft.rules import RULES
from hft_megatron.hft.units import EMBEDDING_NAME, LM_HEAD_NAME, Unit


def apply_overrides(units: Sequence[Unit], selected: frozenset[str], policy: Policy) -> frozenset[str]:
    """``selected`` with the policy's freezes and lists applied.

    A pattern is ``fnmatch``'s, matched with case against a unit's Hugging Face name, alone or with ``.weight``. Raises
    ``UserError`` for a pattern that matches no unit, and for a unit that two options both train and freeze.
    """
    names = [unit.name for unit in units]
    trains: dict[str, str] = {}
    frozen = _frozen_outside(names, policy)
    for option, patterns, matched in (("--hft-train", policy.train, trains), ("--hft-freeze", policy.freeze, frozen)):
        for pattern in patterns:
            for name in _matches(option, pattern, names):
                matched.setdefault(name, f"{option} {pattern}")
    both = next((name for name in names if name in trains and name in frozen), None)
    if both is not None:
        raise UserError(
            f"{trains[both]} and {frozen[both]} both match {both}, but a unit cannot always train and stay frozen; "
            "narrow one of the two."
        )
    return selected.union(trains).difference(frozen)


def _frozen_outside(names: Sequence[str], policy: Policy) -> dict[str, str]:
    """The units that the switches freeze, with the option that does it."""
    tied = LM_HEAD_NAME not in names
    assert not tied or policy.freeze_embedding == policy.freeze_head, "the rules of the options refuse half of a tie"
    frozen = {EMBEDDING_NAME: "--hft-freeze-embedding"} if policy.freeze_embedding else {}
    if policy.freeze_head and not tied:
        frozen[LM_HEAD_NAME] = "--hft-freeze-head"
    return frozen


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


def training_units(units: Sequence[Unit], *, policy: Policy, round: int, scores: Mapping[str, float]) -> frozenset[str]:
    """Names of the units that train in ``round``.

    Under fixed rotation every round selects as round 0 does; under complementary rotation odd rounds train the layers'
    units that round 0 freezes. Raises ``UserError`` for patterns that don't fit the model, or when nothing would train.
    """
    drawn_for = round if policy.rotation == "independent" else 0
    draw = Draw(seed=policy.seed, round=drawn_for)
    selected = RULES[policy.rule].select(units, policy=policy, draw=draw, scores=scores)
    if policy.rotation == "complementary" and round % 2:
        selected ^= {unit.name for unit in units if unit.layer is not None}
    training = apply_overrides(units, selected, policy)
    if not training:
        raise UserError(
            f"--hft-ratio {policy.ratio} with the frozen units leaves nothing to train in round {round}; "
            "raise the ratio or freeze fewer units."
        )
    return training
