"""Which units train in a round: one small class per rule, and the draw they all use.

Pure: the result depends on the units, the ratio, the seed and the round, and on nothing else (no global RNG, no
layout, no Python version).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Protocol

from hft_megatron.errors import UserError
from hft_megatron.hft.units import LAYER_CATEGORIES, Category, Unit


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The randomness of one round. Draws for different purposes are independent of each other.

    Every candidate gets the SHA-256 of (seed, round, purpose, candidate) and the smallest hashes win: uniform over
    subsets, independent of the order of the candidates, and the same in every Python and on every machine, which
    ``random.sample`` does not promise.
    """

    seed: int
    round: int

    def choose(self, candidates: Iterable[str], count: int, *, purpose: str) -> frozenset[str]:
        """``count`` of the distinct ``candidates``, every subset of that size equally likely."""
        names = sorted(set(candidates))
        assert 0 <= count <= len(names), f"cannot choose {count} of {len(names)} for {purpose}"
        return frozenset(sorted(names, key=lambda name: self._key(purpose, name))[:count])

    def _key(self, purpose: str, candidate: str) -> bytes:
        return hashlib.sha256(f"hft|{self.seed}|{self.round}|{purpose}|{candidate}".encode()).digest()


class SelectionRule(Protocol):
    """One way to select. Implementations hold no state."""

    @property
    def name(self) -> str:
        """The name a plan records."""
        ...

    def training_set(self, units: Sequence[Unit], *, ratio: Fraction, draw: Draw) -> frozenset[str]:
        """The names of the units that train."""
        ...


@dataclass(frozen=True, kw_only=True)
class CategoryRule:
    """The paper's best: the same share of every category, spread as evenly over the layers as counting allows.

    Source: PAPER 1.1 rules 3 to 7 (Hui et al., arXiv 2404.18466), for any ratio by DESIGN section 2.
    """

    name: str = "category"

    def training_set(self, units: Sequence[Unit], *, ratio: Fraction, draw: Draw) -> frozenset[str]:
        """The training units: ``units_to_train`` of each category of the layers, and all units outside the layers."""
        training = {unit.name for unit in units if unit.layer is None}
        for category in LAYER_CATEGORIES:
            training |= self._draw_category(units, category=category, ratio=ratio, draw=draw)
        return frozenset(training)

    def _draw_category(
        self, units: Sequence[Unit], *, category: Category, ratio: Fraction, draw: Draw
    ) -> frozenset[str]:
        """Draw first which layers train one unit more than the others, then the units within each layer."""
        by_layer: dict[int, list[str]] = {}
        for unit in units:
            if unit.layer is not None and unit.category == category:
                by_layer.setdefault(unit.layer, []).append(unit.name)
        if not by_layer:
            return frozenset()
        total = units_to_train(ratio, sum(len(names) for names in by_layer.values()))
        per_layer, remainder = divmod(total, len(by_layer))
        layers_with_one_more = draw.choose(map(str, by_layer), remainder, purpose=f"{category} layers")
        training: set[str] = set()
        for layer, names in by_layer.items():
            count = per_layer + (str(layer) in layers_with_one_more)
            training |= draw.choose(names, count, purpose=f"{category} units of layer {layer}")
        return frozenset(training)


RULES: Mapping[str, SelectionRule] = {rule.name: rule for rule in (CategoryRule(),)}
"""Every selection rule by the name a plan records."""


def exact_ratio(ratio: float) -> Fraction:
    """The ratio as the user wrote it in decimal: 0.35 becomes 7/20 and not the double nearest to it.

    Raises ``UserError`` when it is not between 0 and 1.
    """
    if not 0 <= ratio <= 1:  # also catches NaN
        raise UserError(
            f"--hft-ratio {ratio} is not between 0 and 1: it is the share of the matrices that trains, "
            "0.5 for half fine-tuning and 1 for full fine-tuning."
        )
    return Fraction(str(ratio))


def units_to_train(ratio: Fraction, units: int) -> int:
    """floor(ratio x units + 1/2) of ``units`` (DESIGN section 2): to the nearest, a half rounded up."""
    return floor(ratio * units + Fraction(1, 2))
