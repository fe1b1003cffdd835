"""Spectrum: the matrices with the highest signal-to-noise ratio train. The ratios come from ``hft.spectrum``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hft_megatron.hft.category_rule import draw_category
from hft_megatron.hft.draw import Draw, nearest
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import MATRIX_CATEGORIES, Unit


class SpectrumRule:
    """Per category the floor(ratio x matrices + 1/2) of the highest score over all layers, ties to the lower layer;
    one norm of two as in ``CategoryRule``, and all units outside the layers.

    Source: Hartford et al., "Spectrum", arXiv 2406.06623, which ranks within every type of matrix; ranking within
    attention and feed-forward is ours, so that the totals are those of the other rules. The scores are computed once,
    so every round selects the same and only complementary rotation changes anything.
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """The ranked matrices, the norms drawn for round 0 and all units outside the layers."""
        training = {unit.name for unit in units if unit.layer is None}
        for category in MATRIX_CATEGORIES:
            names = [unit.name for unit in units if unit.category == category]
            # sorted() is stable, so equal scores stay in canonical order.
            ranked = sorted(names, key=lambda name: -scores[name])
            training.update(ranked[: nearest(policy.exact_ratio * len(names))])
        return frozenset(training) | draw_category(units, category="norm", policy=policy, draw=replace(draw, round=0))
