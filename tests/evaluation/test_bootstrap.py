"""Confidence intervals from resampled examples. Run: pytest tests/evaluation/test_bootstrap.py"""

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest

from hft_megatron.evaluation.bootstrap import interval, paired_difference
from hft_megatron.evaluation.measures import MEASURES


def mean(sums: Sequence[float]) -> float:
    return sums[0] / sums[1]


def with_ones(values: np.ndarray) -> np.ndarray:
    """Statistics of a mean."""
    return np.stack([values, np.ones(len(values))], axis=1)


def test_an_interval_is_that_of_the_normal_approximation_where_that_holds() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    found = interval(with_ones(values), mean)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_a_higher_level_has_a_wider_interval() -> None:
    values = with_ones(np.random.default_rng(1).normal(size=500))
    narrow, wide = interval(values, mean, level=0.8), interval(values, mean, level=0.99)
    assert (narrow.high - narrow.low) / (wide.high - wide.low) == pytest.approx(1.2816 / 2.5758, rel=0.08)


def test_pairing_takes_out_what_is_hard_for_both_models() -> None:
    generator = np.random.default_rng(2)
    hardness = generator.normal(0, 10, size=1000)
    gain = generator.normal(0.5, 1, size=1000)
    found = paired_difference(with_ones(hardness), with_ones(hardness + gain), mean)
    half = 1.96 * gain.std() / math.sqrt(1000)
    assert found.value == pytest.approx(gain.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert found.low > 0  # the second is better, which unpaired intervals of the half-width 0.6 would not show


def test_swapping_the_models_turns_the_sign() -> None:
    generator = np.random.default_rng(3)
    one, other = with_ones(generator.normal(size=50)), with_ones(generator.normal(size=50))
    there, back = paired_difference(one, other, mean), paired_difference(other, one, mean)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))


def test_equal_models_differ_by_exactly_0() -> None:
    generator = np.random.default_rng(4)
    nats = np.stack([generator.gamma(2.0, 100.0, 333), generator.integers(1, 200, 333)], axis=1)
    found = paired_difference(nats, nats.copy(), MEASURES["perplexity"].total)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_of_one_example_nothing_is_known_of_the_spread() -> None:
    found = paired_difference([[0.0, 1.0]], [[1.0, 1.0]], MEASURES["accuracy"].total)
    assert (found.value, found.low, found.high) == (100, -math.inf, math.inf)


def test_a_ratio_of_sums_is_resampled_as_such() -> None:
    """Nats per token, where long documents weigh more: the delta method gives the standard error."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(10, 500, size=3000)
    nats = tokens * generator.normal(2.0, 0.5, size=3000)
    found = interval(np.stack([nats, tokens], axis=1), MEASURES["cross_entropy"].total)
    error = np.sqrt(np.sum((nats - found.value * tokens) ** 2)) / tokens.sum()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_95_of_100_intervals_hold_the_truth() -> None:
    """Over 200 planted sets of 100 pairs whose models differ by 0.3: the binomial's 3 standard deviations are 9.2."""
    generator = np.random.default_rng(6)
    hits = 0
    for _ in range(200):
        one = generator.normal(size=100)
        other = one + generator.normal(0.3, 1.0, size=100)
        found = paired_difference(with_ones(one), with_ones(other), mean, samples=400)
        hits += found.low <= 0.3 <= found.high
    assert 190 - 10 <= hits <= 190 + 9


def test_the_same_seed_gives_the_same_interval_and_another_one_a_like_one() -> None:
    values = with_ones(np.random.default_rng(7).normal(size=400))
    assert interval(values, mean) == interval(values, mean)
    assert interval(values, mean, seed=1) != interval(values, mean)
    assert interval(values, mean, seed=1).low == pytest.approx(interval(values, mean).low, abs=0.02)


@pytest.mark.slow
def test_ten_thousand_examples_take_little_time() -> None:
    statistics = np.random.default_rng(8).integers(0, 50, size=(10_000, 10)).astype(float)
    start = time.process_time()
    paired_difference(statistics, statistics[::-1], MEASURES["bleu"].total)
    assert time.process_time() - start < 3
