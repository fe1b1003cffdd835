"""The paper's rule and the draw under it. Run: pytest tests/hft/test_selection.py"""

import hashlib
import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest

from hft_megatron.hft.policy import Draw, Policy, exact_ratio, nearest
from hft_megatron.hft.selection import training_units
from hft_megatron.hft.units import LAYER_CATEGORIES, units_of
from tests.support.shapes import tiny_shape

EIGHTHS = [eighth / 8 for eighth in range(9)]
LAYERS = [*range(1, 10), 32]
UNITS_PER_LAYER = {"attention": 4, "feed_forward": 3, "norm": 2}


def select(num_layers: int, ratio: float, *, seed: int, round: int = 0) -> frozenset[str]:
    policy = Policy(ratio=ratio, seed=seed)
    return training_units(units_of(tiny_shape(num_layers)), policy=policy, round=round, scores={})


def training_per_layer(num_layers: int, training: frozenset[str], category: str) -> list[int]:
    counts = [0] * num_layers
    for unit in units_of(tiny_shape(num_layers)):
        if unit.layer is not None and unit.category == category:
            counts[unit.layer] += unit.name in training
    return counts


@pytest.mark.parametrize("num_layers", LAYERS)
@pytest.mark.parametrize("ratio", EIGHTHS)
def test_totals_are_exact_and_layers_differ_by_at_most_one(num_layers: int, ratio: float) -> None:
    for seed, category in itertools.product(range(5), LAYER_CATEGORIES):
        counts = training_per_layer(num_layers, select(num_layers, ratio, seed=seed), category)
        # Eighths are exact in binary, so this float arithmetic is exact too.
        assert sum(counts) == int(ratio * UNITS_PER_LAYER[category] * num_layers + 0.5)
        assert max(counts) - min(counts) <= 1


def test_half_trains_two_attention_matrices_one_norm_and_on_average_one_and_a_half_feed_forward_matrices() -> None:
    training = select(32, 0.5, seed=3)
    assert training_per_layer(32, training, "attention") == [2] * 32
    assert training_per_layer(32, training, "norm") == [1] * 32
    assert Counter(training_per_layer(32, training, "feed_forward")) == {1: 16, 2: 16}


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_embedding_final_norm_and_head_always_train(ratio: float) -> None:
    assert {"model.embed_tokens", "model.norm", "lm_head"} <= select(3, ratio, seed=0)


def test_ratio_one_trains_everything_and_ratio_zero_nothing_inside_the_layers() -> None:
    assert select(5, 1.0, seed=0) == {unit.name for unit in units_of(tiny_shape(5))}
    assert select(5, 0.0, seed=0) == {unit.name for unit in units_of(tiny_shape(5)) if unit.layer is None}


def test_a_half_is_rounded_up_by_the_decimal_ratio_and_not_by_its_double() -> None:
    # As doubles 0.29 * 50 + 0.5 is 14.999999999999998 and floors to 14.
    assert nearest(exact_ratio(0.29) * 50) == 15
    assert nearest(exact_ratio(0.3) * 5) == 2
    assert exact_ratio(0.35) == Fraction(7, 20)
    assert exact_ratio(1e-05) == Fraction(1, 100_000)


def test_the_global_rng_makes_no_difference_and_is_left_alone() -> None:
    random.seed(1)
    first = select(6, 0.5, seed=9)
    random.seed(2)
    state = random.getstate()
    assert select(6, 0.5, seed=9) == first
    assert random.getstate() == state


def test_seed_and_round_each_change_the_selection() -> None:
    selections = {select(8, 0.5, seed=seed, round=round) for seed in range(10) for round in range(10)}
    assert len(selections) == 100


def test_the_draw_does_not_depend_on_the_order_of_the_candidates() -> None:
    draw = Draw(seed=1, round=2)
    orders = itertools.permutations(["a", "b", "c", "d"])
    assert len({draw.choose(order, 2, purpose="p") for order in orders}) == 1


def test_the_draw_takes_the_smallest_sha256_of_seed_round_purpose_and_name() -> None:
    keys = {name: hashlib.sha256(f"hft|7|3|norm layers|{name}".encode()).hexdigest() for name in "01234"}
    assert Draw(seed=7, round=3).choose("01234", 2, purpose="norm layers") == set(
        sorted(keys, key=keys.__getitem__)[:2]
    )
