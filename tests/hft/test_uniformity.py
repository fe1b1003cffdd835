"""Every outcome of every draw is equally likely: chi-square over 3,000 seeds. Run: pytest tests/hft/test_uniformity.py

A cell is a draw and what to look at in it, with the number of outcomes that must be equally likely. The seeds are
fixed, so each is settled once: one false alarm in a thousand over all cells together (Bonferroni). The bound depends on
outcomes and cells, not on the seeds; their number decides how small a bias shows. A draw of two outcomes with shares
of 0.5 (1 + x) and 0.5 (1 - x) has a chi-square of about SEEDS x^2, and the bound for it is 16.8: x = 0.075 is on it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from statistics import NormalDist

import pytest

from hft_megatron.hft.policy import Draw, Policy
from hft_megatron.hft.rules import RULES, draw_category
from hft_megatron.hft.units import Category, units_of
from tests.support.shapes import tiny_shape

SEEDS = 3_000
"""The 70 outcomes of the largest cell are expected 43 times each; chi-square's approximation needs 5."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
Training = frozenset[str]


@cache
def category(name: Category, num_layers: int, *, round: int = 0, groups: int = 2, **options: str) -> list[Training]:
    """One category under ``CategoryRule`` at every seed; only what is looked at is drawn, as hashing takes the time."""
    units = [unit for unit in units_of(tiny_shape(num_layers, groups=groups)) if unit.category == name]
    policy = Policy(ratio=0.5, seed=0, **options)  # type: ignore[arg-type]
    return [
        draw_category(units, category=name, policy=policy, draw=Draw(seed=seed, round=round)) for seed in range(SEEDS)
    ]


@cache
def rule(name: str, num_layers: int, *, round: int = 0) -> list[Training]:
    units, policy = units_of(tiny_shape(num_layers)), Policy(ratio=0.5, seed=0)
    return [
        RULES[name].select(units, policy=policy, draw=Draw(seed=seed, round=round), scores={}) for seed in range(SEEDS)
    ]


def members(training: Training, layer: int, suffixes: tuple[str, ...]) -> frozenset[str]:
    names = (name for name in training if name.startswith(f"model.layers.{layer}."))
    return frozenset(name.rpartition(".")[2] for name in names if name.endswith(suffixes))


def layers_with(training: Training, unit: str) -> frozenset[int]:
    return frozenset(layer for layer in range(4) if f"model.layers.{layer}.{unit}" in training)


def layers_with_two_feed_forward(training: Training) -> frozenset[int]:
    return frozenset(layer for layer in range(4) if len(members(training, layer, FEED_FORWARD)) == 2)


def feed_forward_of_layer_one(count: int) -> list[Training]:
    drawn = (members(training, 1, FEED_FORWARD) for training in category("feed_forward", 4))
    return [units for units in drawn if len(units) == count]


def together(first: list[Training], second: list[Training]) -> list[Hashable]:
    return list(zip(first, second, strict=True))


CELLS: dict[str, tuple[int, Callable[[], Iterable[Hashable]]]] = {
    "attention pair of layer 0": (6, lambda: (members(t, 0, ATTENTION) for t in category("attention", 2))),
    "attention pairs of two layers": (36, lambda: category("attention", 2)),
    "attention pairs of two rounds": (
        36,
        lambda: together(category("attention", 1), category("attention", 1, round=1)),
    ),
    "attention pair and norm": (12, lambda: together(category("attention", 1), category("norm", 1))),
    "which layers train two feed-forward matrices": (
        6,
        lambda: map(layers_with_two_feed_forward, category("feed_forward", 4)),
    ),
    "the feed-forward matrix of a layer that trains one": (3, lambda: feed_forward_of_layer_one(1)),
    "the feed-forward matrices of a layer that trains two": (3, lambda: feed_forward_of_layer_one(2)),
    "norms of all layers": (16, lambda: category("norm", 4)),
    "attention counted by parameters under grouped queries": (
        4,
        lambda: category("attention", 1, groups=1, counting="parameters"),
    ),
    "feed-forward matrices of two pairs of layers": (
        36,
        lambda: category("feed_forward", 4, pairing="complementary"),
    ),
    "layers at the layer level": (6, lambda: (layers_with(t, "mlp.up_proj") for t in rule("layer", 4))),
    "layers of LISA in round 3": (6, lambda: (layers_with(t, "mlp.up_proj") for t in rule("lisa", 4, round=3))),
    "matrices and norm at the model level": (70, lambda: rule("model", 1)),
}


def chi_square_bound(degrees: int, probability: float) -> float:
    """The value that chi-square exceeds with this probability (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + NormalDist().inv_cdf(1 - probability) * spread**0.5) ** 3)


def chi_square(counts: Counter[Hashable], outcomes: int) -> float:
    expected = counts.total() / outcomes
    return sum((count - expected) ** 2 / expected for count in counts.values()) + (outcomes - len(counts)) * expected


@pytest.mark.parametrize("cell", CELLS)
def test_every_outcome_is_equally_likely(cell: str) -> None:
    outcomes, observe = CELLS[cell]
    counts = Counter(observe())
    # The two cells of one layer see the half of the seeds in which it trains as many; 5 deviations fewer are no chance.
    assert counts.total() > SEEDS / 2 - 5 * (SEEDS / 4) ** 0.5
    assert len(counts) <= outcomes
    assert chi_square(counts, outcomes) < chi_square_bound(outcomes - 1, 0.001 / len(CELLS))


def test_the_chi_square_bound_rejects_a_draw_that_is_eight_in_a_hundred_off() -> None:
    biased: Counter[Hashable] = Counter({"q": 54 * SEEDS // 100, "k": 46 * SEEDS // 100})
    assert biased.total() == SEEDS
    assert chi_square(biased, 2) > chi_square_bound(1, 0.001 / len(CELLS))
