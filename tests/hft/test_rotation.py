"""Complementary layers and what changes from round to round. Run: pytest tests/hft/test_rotation.py"""

import itertools
from typing import Any

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.hft.plan import Plan, make_plan
from tests.support.shapes import tiny_shape

OUTSIDE = {"model.embed_tokens", "model.norm", "lm_head"}
LAYERS = [*range(1, 10), 32]


def draw(num_layers: int, *, seed: int = 0, round: int = 0, **options: Any) -> Plan:
    config = HFTConfig(**{f"hft_{name}": value for name, value in options.items()})
    return make_plan(tiny_shape(num_layers, heads=32, groups=8), config, default_seed=seed, round=round)


def of_layer(plan: Plan, layer: int) -> frozenset[str]:
    """What trains in a layer, by the units' names within it."""
    prefix = f"model.layers.{layer}."
    return frozenset(name.removeprefix(prefix) for name in plan.training if name.startswith(prefix))


def all_of_layer(plan: Plan) -> frozenset[str]:
    return frozenset(unit.name.removeprefix("model.layers.0.") for unit in plan.units if unit.layer == 0)


def parameters(plan: Plan, layers: range, category: str, *, training: bool) -> int:
    return sum(
        unit.parameters
        for unit in plan.units
        if unit.layer in layers and unit.category == category and (plan.trains(unit.name) or not training)
    )


@pytest.mark.parametrize("counting", ["matrices", "parameters"])
def test_layers_2i_and_2i_plus_1_train_complements_and_totals_are_exact(counting: str) -> None:
    for num_layers, seed in itertools.product(LAYERS, range(5)):
        plan = draw(num_layers, seed=seed, pairing="complementary", counting=counting)
        for layer in range(0, num_layers - 1, 2):
            assert of_layer(plan, layer) ^ of_layer(plan, layer + 1) == all_of_layer(plan)
            assert not of_layer(plan, layer) & of_layer(plan, layer + 1)
        totals = {count.category: count.training_units for count in plan.counts()}
        assert (totals["attention"], totals["norm"]) == (2 * num_layers, num_layers)
        assert totals["feed_forward"] == (3 * num_layers + 1) // 2


def test_pairs_are_exactly_half_by_parameters_on_every_stage_of_an_even_number_of_layers() -> None:
    for num_layers, seed in itertools.product((2, 4, 8, 32), range(5)):
        plan = draw(num_layers, seed=seed, pairing="complementary")
        for stages in (stages for stages in range(1, num_layers) if num_layers % (2 * stages) == 0):
            length = num_layers // stages
            for first, category in itertools.product(
                range(0, num_layers, length), ("attention", "feed_forward", "norm")
            ):
                layers = range(first, first + length)
                whole = parameters(plan, layers, category, training=False)
                assert 2 * parameters(plan, layers, category, training=True) == whole


def test_an_odd_last_layer_is_reported() -> None:
    assert "layer 4 has no partner and was drawn alone" in draw(5, pairing="complementary").describe()
    assert "no partner" not in draw(4, pairing="complementary").describe()
    assert "no partner" not in draw(5).describe()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"counting": "parameters"},
        {"pairing": "complementary"},
        {"level": "layer"},
        {"level": "model"},
        {"level": "model", "counting": "parameters"},
    ],
    ids=str,
)
def test_two_complementary_rounds_train_every_unit_of_the_layers_once(options: dict[str, Any]) -> None:
    for num_layers in LAYERS:
        rounds = [draw(num_layers, round=round, rotation="complementary", **options) for round in range(4)]
        layers = {unit.name for unit in rounds[0].units if unit.layer is not None}
        inside = [plan.training & layers for plan in rounds]
        assert inside[0] | inside[1] == layers
        assert not inside[0] & inside[1]
        assert (inside[2], inside[3]) == (inside[0], inside[1])
        assert all(plan.training >= OUTSIDE for plan in rounds)


def test_fixed_rounds_are_the_first_and_independent_rounds_differ() -> None:
    fixed = {draw(4, round=round, rotation="fixed").training for round in range(5)}
    independent = {draw(4, round=round).training for round in range(5)}
    assert fixed == {draw(4).training}
    assert len(independent) == 5
