"""The order of samples is a pure function of seed and position, and every epoch holds each example once."""

import pytest

from hft_megatron.data.order import SampleOrder


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
