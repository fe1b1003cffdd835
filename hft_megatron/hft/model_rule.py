"""Matrices drawn over the whole model: layers and categories come out as chance has it."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

from hft_megatron.hft.draw import Draw, nearest
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import Unit


class ModelRule:
    """floor(ratio x matrices + 1/2) of all attention and feed-forward matrices, norms by the same ratio of their own,
    and all units outside the layers.

    Source: the level "model" of the method's ablation (Hui et al., arXiv 2404.18466), which leaves open how to count.
    By parameters, the shuffled matrices train up to the place where their share is closest to the ratio (the later
    place where two are equally close).
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """The drawn matrices and norms and all units outside the layers."""
        inside = [unit for unit in units if unit.layer is not None]
        training = {unit.name for unit in units if unit.layer is None}
        for purpose, members in (
            ("matrices", [unit for unit in inside if unit.category != "norm"]),
            ("norms", [unit for unit in inside if unit.category == "norm"]),
        ):
            sizes = {unit.name: unit.parameters for unit in members}
            order = draw.shuffle(sizes, purpose=purpose)
            if policy.counting == "matrices":
                count = nearest(policy.exact_ratio * len(order))
            else:
                count = _closest_prefix([sizes[name] for name in order], policy.exact_ratio)
            training.update(order[:count])
        return frozenset(training)


def _closest_prefix(sizes: Sequence[int], ratio: Fraction) -> int:
    """How many of the first ``sizes`` add up closest to ``ratio`` of all."""
    sums = [0, *accumulate(sizes)]
    return min(range(len(sums)), key=lambda count: (abs(sums[count] - ratio * sums[-1]), -count))
