"""The order of samples is a pure function of seed and position, and every epoch holds each example once."""

from itertools import pairwise

import numpy as np
import pytest

from hft_megatron.data.order import MixtureOrder, SampleOrder, shares_of_epoch


@pytest.mark.parametrize("num_examples", [1, 2, 7, 1000])
@pytest.mark.parametrize("seed", [0, 1234])
def test_every_epoch_holds_each_example_once(num_examples: int, seed: int) -> None:
    order = SampleOrder(num_examples=num_examples, seed=seed)
    for epoch in range(3):
        start = epoch * num_examples
        drawn = [order.sample_index(consumed) for consumed in range(start, start + num_examples)]
        assert sorted(drawn) == list(range(num_examples))
        assert {order.epoch_of(consumed) for consumed in range(start, start + num_examples)} == {epoch}


def test_epochs_and_seeds_differ_and_the_order_is_shuffled() -> None:
    first = SampleOrder(num_examples=100, seed=1)
    orders = [
        [first.sample_index(consumed) for consumed in range(100)],
        [first.sample_index(consumed) for consumed in range(100, 200)],
        [SampleOrder(num_examples=100, seed=2).sample_index(consumed) for consumed in range(100)],
        list(range(100)),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_any_position_can_be_asked_for_first() -> None:
    order = SampleOrder(num_examples=10, seed=3)
    forward = [order.sample_index(consumed) for consumed in range(50)]
    assert [order.sample_index(consumed) for consumed in reversed(range(50))] == forward[::-1]


def test_the_order_of_a_seed_never_changes() -> None:
    # Resuming an old run needs this: another list here is other data in every run.
    order = SampleOrder(num_examples=8, seed=1234)
    assert [order.sample_index(consumed) for consumed in range(8)] == [1, 6, 4, 5, 0, 3, 2, 7]


def mixture(sizes: tuple[int, ...], weights: list[float], seed: int = 5) -> MixtureOrder:
    shares = shares_of_epoch(sizes, weights)
    return MixtureOrder(num_examples=sum(sizes), seed=seed, sizes=sizes, shares=shares)


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ((10, 10), [1, 1], (10, 10)),
        ((10, 10), [0.3, 0.7], (6, 14)),
        ((1, 1000), [1, 1], (501, 500)),  # 500.5 each: the first of equal remainders is rounded up
        ((3, 3, 4), [1, 1, 1], (4, 3, 3)),
        ((100,), [0.2], (100,)),
        ((5, 5), [1, 1e-9], (10, 0)),
    ],
)
def test_an_epoch_is_shared_by_weight_and_has_as_many_samples_as_there_are_examples(
    sizes: tuple[int, ...], weights: list[float], shares: tuple[int, ...]
) -> None:
    assert shares_of_epoch(sizes, weights) == shares


@pytest.mark.parametrize(("sizes", "weights"), [((7, 20), [3, 1]), ((1, 50), [1, 1]), ((40, 3, 5), [0.1, 0.6, 0.3])])
def test_every_epoch_of_a_mixture_holds_each_sources_share(sizes: tuple[int, ...], weights: list[float]) -> None:
    order = mixture(sizes, weights)
    total, starts = sum(sizes), [sum(sizes[:number]) for number in range(len(sizes))]
    seen = np.zeros(total, dtype=int)
    for epoch in range(6):
        drawn = [order.sample_index(consumed) for consumed in range(epoch * total, (epoch + 1) * total)]
        seen += np.bincount(drawn, minlength=total)
        for start, size, share in zip(starts, sizes, order.shares, strict=True):
            assert sum(start <= index < start + size for index in drawn) == share
            # No example of a source is seen a second time more often than another one.
            assert np.ptp(seen[start : start + size]) <= 1


def test_a_mixture_is_mixed_differs_by_epoch_and_seed_and_can_be_asked_anywhere() -> None:
    order = mixture((30, 30), [0.5, 0.5])
    forward = [order.sample_index(consumed) for consumed in range(180)]
    assert [order.sample_index(consumed) for consumed in reversed(range(180))] == forward[::-1]
    epochs = [tuple(forward[start : start + 60]) for start in (0, 60, 120)]
    other = mixture((30, 30), [0.5, 0.5], seed=6)
    epochs.append(tuple(other.sample_index(consumed) for consumed in range(60)))
    assert len(set(epochs)) == 4
    changes = sum((a < 30) != (b < 30) for a, b in pairwise(epochs[0]))
    assert 15 < changes < 45


def test_the_order_of_a_mixture_never_changes() -> None:
    # Resuming an old run needs this, as for a single source.
    order = mixture((3, 5), [1, 3], seed=1234)
    assert [order.sample_index(consumed) for consumed in range(16)] == [1, 6, 7, 5, 0, 3, 4, 3, 4, 6, 7, 2, 6, 1, 5, 5]
