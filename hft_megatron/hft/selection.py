"""Which units train in a round: the registry of selection rules, the rotation over rounds, and what wins over both."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from hft_megatron.errors import UserError
from hft_megatron.hft.category_rule import CategoryRule
from hft_megatron.hft.draw import Draw
from hft_megatron.hft.hift_rule import HiftRule
from hft_megatron.hft.layer_rule import LayerRule
from hft_megatron.hft.model_rule import ModelRule
from hft_megatron.hft.overrides import apply_overrides
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.spectrum_rule import SpectrumRule
from hft_megatron.hft.units import Unit


class SelectionRule(Protocol):
    """One way to select. Implementations hold no state and read neither rotation nor overrides from the policy."""

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """The names of the units that train in ``draw.round``. ``scores`` (unit name to score) are for rules that
        rank."""
        ...


RULES: Mapping[str, SelectionRule] = {
    "category": CategoryRule(),
    "layer": LayerRule(),
    "model": ModelRule(),
    "spectrum": SpectrumRule(),
    "lisa": LayerRule(),
    "hift": HiftRule(),
}
"""Every selection rule, by ``Policy.rule``."""


def training_units(units: Sequence[Unit], *, policy: Policy, round: int, scores: Mapping[str, float]) -> frozenset[str]:
    """Names of the units that train in ``round``.

    Under fixed rotation every round selects as round 0 does; under complementary rotation odd rounds train the layers'
    units that round 0 rests. Raises ``UserError`` for patterns that don't fit the model, or when nothing would train.
    """
    drawn_for = round if policy.rotation == "independent" else 0
    draw = Draw(seed=policy.seed, round=drawn_for)
    selected = RULES[policy.rule].select(units, policy=policy, draw=draw, scores=scores)
    if policy.rotation == "complementary" and round % 2:
        selected ^= {unit.name for unit in units if unit.layer is not None}
    training = apply_overrides(units, selected, policy)
    if not training:
        raise UserError(
            f"--hft-ratio {policy.ratio} with these freezes leaves nothing to train in round {round}; "
            "raise the ratio or freeze less."
        )
    return training
