"""Totals of every level, way of counting and rival method. Run: pytest tests/hft/test_levels.py"""

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.rules import RULES
from hft_megatron.hft.units import units_of
from tests.support.shapes import tiny_shape

EIGHTHS = [eighth / 8 for eighth in range(9)]
LAYERS = [*range(1, 10), 32]
CASES = list(itertools.product(LAYERS, EIGHTHS))
OUTSIDE = {"model.embed_tokens", "model.norm", "lm_head"}


def draw(num_layers: int, *, seed: int = 0, round: int = 0, groups: int = 1, **options: Any) -> Plan:
    config = HFTConfig(**{f"hft_{name}": value for name, value in options.items()})
    return make_plan(tiny_shape(num_layers, heads=4, groups=groups), config, default_seed=seed, round=round)


def training_layers(plan: Plan) -> Counter[int]:
    """How many units of each layer train."""
    return Counter(unit.layer for unit in plan.units if unit.layer is not None and plan.trains(unit.name))


def by_category(plan: Plan) -> dict[str, tuple[int, int]]:
    return {count.category: (count.training_units, count.training_parameters) for count in plan.counts()}


@pytest.mark.parametrize("selection", [{"level": "layer"}, {"selection": "lisa"}], ids=str)
def test_whole_layers_train_or_stay_frozen_and_their_total_is_exact(selection: dict[str, Any]) -> None:
    for (num_layers, ratio), seed in itertools.product(CASES, range(3)):
        plan = draw(num_layers, ratio=ratio, seed=seed, **selection)
        # Eighths are exact in binary, so this float arithmetic is exact too.
        assert len(training_layers(plan)) == int(ratio * num_layers + 0.5)
        assert set(training_layers(plan).values()) <= {9}
        assert plan.training >= OUTSIDE


def test_lisa_draws_other_layers_in_other_rounds() -> None:
    drawn = {frozenset(training_layers(draw(8, ratio=0.25, selection="lisa", round=round))) for round in range(10)}
    assert len(drawn) > 5


def test_the_model_level_counts_matrices_and_norms_over_the_whole_model() -> None:
    for (num_layers, ratio), seed in itertools.product(CASES, range(3)):
        plan = draw(num_layers, ratio=ratio, seed=seed, level="model")
        counts = by_category(plan)
        assert counts["attention"][0] + counts["feed_forward"][0] == int(ratio * 7 * num_layers + 0.5)
        assert counts["norm"][0] == int(ratio * 2 * num_layers + 0.5)
        assert plan.training >= OUTSIDE


def test_the_model_level_by_parameters_is_closer_to_the_ratio_than_one_matrix_more_or_less() -> None:
    for (num_layers, ratio), seed in itertools.product(CASES, range(3)):
        plan = draw(num_layers, ratio=ratio, seed=seed, level="model", counting="parameters")
        matrices = [unit for unit in plan.units if unit.category in ("attention", "feed_forward")]
        trained = [unit.parameters for unit in matrices if plan.trains(unit.name)]
        distance = abs(sum(trained) - ratio * sum(unit.parameters for unit in matrices))
        assert distance <= max(unit.parameters for unit in matrices) / 2
        assert ratio not in (0, 1) or distance == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_category_level_by_parameters_takes_the_closest_share_of_every_layer(groups: int) -> None:
    for (num_layers, ratio), seed in itertools.product(CASES, range(2)):
        plan = draw(num_layers, ratio=ratio, seed=seed, groups=groups, counting="parameters")
        closest: dict[tuple[int, str], float] = {}
        for layer, category in itertools.product(range(num_layers), ("attention", "feed_forward", "norm")):
            units = [unit for unit in plan.units if (unit.layer, unit.category) == (layer, category)]
            sizes = [unit.parameters for unit in units]
            subsets = (itertools.compress(sizes, mask) for mask in itertools.product((0, 1), repeat=len(sizes)))
            closest[layer, category] = min(abs(sum(subset) - ratio * sum(sizes)) for subset in subsets)
            trained = sum(unit.parameters for unit in units if plan.trains(unit.name))
            assert abs(trained - ratio * sum(sizes)) == closest[layer, category]


def test_by_parameters_half_of_attention_is_exactly_half_under_grouped_queries_32_to_8() -> None:
    shape = tiny_shape(5, heads=32, groups=8)
    for seed in range(20):
        plan = make_plan(shape, HFTConfig(hft_counting="parameters"), default_seed=seed)
        [attention] = [count for count in plan.counts() if count.category == "attention"]
        assert attention.parameter_ratio == 0.5


def test_where_two_shares_are_equally_close_half_of_the_layers_train_the_larger() -> None:
    for num_layers, seed in itertools.product(LAYERS, range(3)):
        for counting in ("matrices", "parameters"):
            plan = draw(num_layers, seed=seed, counting=counting)
            assert by_category(plan)["feed_forward"][0] == (3 * num_layers + 1) // 2


def test_hift_trains_every_unit_once_in_a_cycle_from_the_bottom_up() -> None:
    for num_layers, ratio, tied in itertools.product(LAYERS, EIGHTHS, (False, True)):
        shape, config = tiny_shape(num_layers, tied=tied), HFTConfig(hft_ratio=ratio, hft_selection="hift")
        groups = RULES["hift"].cycle(units_of(shape), Fraction(ratio))
        size = max(1, int(ratio * (num_layers + 2) + 0.5))
        assert groups == -(-(num_layers + 2) // size)
        cycle = [make_plan(shape, config, default_seed=0, round=round).training for round in range(groups)]
        # Canonical order is the order of the blocks, so the rounds of a cycle are slices of it.
        names = [unit.name for unit in units_of(shape)]
        assert [name for training in cycle for name in names if name in training] == names
        assert sum(map(len, cycle)) == len(names)
        assert make_plan(shape, config, default_seed=0, round=groups).training == cycle[0]


def test_the_last_block_of_hift_is_the_final_norm_with_the_head_that_is_not_tied() -> None:
    config = HFTConfig(hft_ratio=0.1, hft_selection="hift")
    for tied, block in ((False, {"model.norm", "lm_head"}), (True, {"model.norm"})):
        last = make_plan(tiny_shape(3, tied=tied), config, default_seed=0, round=4)
        assert last.training == block


def test_ratio_one_is_full_fine_tuning_under_every_rule() -> None:
    everything: list[dict[str, Any]] = [
        {"level": "layer"},
        {"level": "model"},
        {"counting": "parameters"},
        {"selection": "lisa"},
    ]
    for options in [*everything, {"level": "model", "counting": "parameters"}, {"selection": "hift"}]:
        assert draw(3, ratio=1.0, **options).frozen_parameters == 0
