import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from fractions import Fraction
from statistics import NormalDist

import pytest

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.hft.draw import Draw, exact_ratio, nearest
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.selection import training_units
from hft_megatron.hft.units import LAYER_CATEGORIES, units_of

EIGHTHS = [eighth / 8 for eighth in range(9)]
LAYERS = [*range(1, 10), 32]
UNITS_PER_LAYER = {"attention": 4, "feed_forward": 3, "norm": 2}


def shape_of(num_layers: int) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=11,
        max_position_embeddings=16,
    )


def select(num_layers: int, ratio: float, *, seed: int, round: int = 0) -> frozenset[str]:
    policy = Policy(ratio=ratio, seed=seed)
    return training_units(units_of(shape_of(num_layers)), policy=policy, round=round, scores={})


def training_per_layer(num_layers: int, training: frozenset[str], category: str) -> list[int]:
    counts = [0] * num_layers
    for unit in units_of(shape_of(num_layers)):
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
    assert select(5, 1.0, seed=0) == {unit.name for unit in units_of(shape_of(5))}
    assert select(5, 0.0, seed=0) == {unit.name for unit in units_of(shape_of(5)) if unit.layer is None}


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


# Uniformity. Every cell is an outcome of the draw on 4 layers, with the number of outcomes that must be equally likely.
SEEDS = 2000
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def members(training: Iterable[str], layer: int, suffixes: tuple[str, ...]) -> frozenset[str]:
    names = (name for name in training if name.startswith(f"model.layers.{layer}."))
    return frozenset(name.rpartition(".")[2] for name in names if name.endswith(suffixes))


def layers_with_two_feed_forward(training: frozenset[str]) -> frozenset[int]:
    return frozenset(layer for layer in range(4) if len(members(training, layer, FEED_FORWARD)) == 2)


Cell = Callable[[frozenset[str]], Hashable]
CELLS: dict[str, tuple[int, Cell]] = {
    "attention pair of layer 0": (6, lambda t: members(t, 0, ATTENTION)),
    "attention pair of layer 3": (6, lambda t: members(t, 3, ATTENTION)),
    "attention pairs of layers 1 and 2 together": (36, lambda t: (members(t, 1, ATTENTION), members(t, 2, ATTENTION))),
    "which layers train two feed-forward matrices": (6, layers_with_two_feed_forward),
    "norm of layer 0": (2, lambda t: members(t, 0, NORMS)),
    "norms of all layers together": (16, lambda t: tuple(members(t, layer, NORMS) for layer in range(4))),
    "norm and attention pair of layer 2": (12, lambda t: (members(t, 2, NORMS), members(t, 2, ATTENTION))),
}


def chi_square_bound(degrees: int, probability: float) -> float:
    """The value that chi-square exceeds with this probability (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + NormalDist().inv_cdf(1 - probability) * spread**0.5) ** 3)


def chi_square(counts: Counter[Hashable], outcomes: int) -> float:
    expected = counts.total() / outcomes
    return sum((count - expected) ** 2 / expected for count in counts.values()) + (outcomes - len(counts)) * expected


@pytest.fixture(scope="module")
def selections() -> list[frozenset[str]]:
    return [select(4, 0.5, seed=seed) for seed in range(SEEDS)]


@pytest.mark.parametrize("cell", CELLS)
def test_every_outcome_is_equally_likely(cell: str, selections: list[frozenset[str]]) -> None:
    outcomes, outcome_of = CELLS[cell]
    counts = Counter(outcome_of(training) for training in selections)
    assert len(counts) <= outcomes
    # Bonferroni: one false alarm in a thousand over all cells; the seeds are fixed, so it is settled once.
    assert chi_square(counts, outcomes) < chi_square_bound(outcomes - 1, 0.001 / (len(CELLS) + 2))


@pytest.mark.parametrize("trained", [1, 2])
def test_the_feed_forward_matrices_of_a_layer_are_drawn_uniformly(
    trained: int, selections: list[frozenset[str]]
) -> None:
    drawn = (members(training, 1, FEED_FORWARD) for training in selections)
    counts: Counter[Hashable] = Counter(units for units in drawn if len(units) == trained)
    assert counts.total() > SEEDS / 3
    assert chi_square(counts, 3) < chi_square_bound(2, 0.001 / (len(CELLS) + 2))


def test_the_chi_square_bound_rejects_a_draw_that_is_one_tenth_off() -> None:
    biased: Counter[Hashable] = Counter({"q": 1100, "k": 900})
    assert chi_square(biased, 2) > chi_square_bound(1, 0.001 / (len(CELLS) + 2))


def test_two_rounds_are_drawn_independently() -> None:
    counts: Counter[Hashable] = Counter(
        tuple(members(select(1, 0.5, seed=seed, round=round), 0, ATTENTION) for round in (0, 1))
        for seed in range(SEEDS)
    )
    assert chi_square(counts, 36) < chi_square_bound(35, 0.001)
