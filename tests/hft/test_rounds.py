"""When rounds begin. Run: pytest tests/hft/test_rounds.py"""

import itertools

import pytest

from hft_megatron.config.batch_sizes import BatchSizes
from hft_megatron.hft.rounds import RoundSchedule


def schedule(
    interval: str,
    *,
    train_iters: int = 12,
    samples: int = 10,
    batch: int = 4,
    first_round: int = 0,
    ramp: tuple[int, ...] = (),
) -> RoundSchedule:
    return RoundSchedule(
        interval=interval,
        train_iters=train_iters,
        epoch_starts=range(0, train_iters * batch + samples, samples),
        batches=BatchSizes(full=batch, ramp=ramp),
        first_round=first_round,
    )


def test_a_stage_is_one_round_at_its_own_number() -> None:
    for first_round in (0, 3):
        stage = schedule("stage", first_round=first_round)
        assert {stage.round_of(iteration) for iteration in range(13)} == {first_round}
        assert (stage.rounds, stage.bounds(first_round)) == (1, (0, 12))


def test_every_n_iterations_a_round_begins_and_the_last_one_may_be_short() -> None:
    every_five = schedule("5")
    assert [every_five.round_of(iteration) for iteration in range(12)] == [0] * 5 + [1] * 5 + [2] * 2
    assert [every_five.bounds(round) for round in range(3)] == [(0, 5), (5, 10), (10, 12)]
    assert every_five.rounds == 3
    assert schedule("6").rounds == 2
    assert schedule("12").rounds == schedule("100").rounds == 1


def test_an_epoch_ends_with_the_batch_that_holds_its_last_sample() -> None:
    # Batches of 4 begin at samples 0 4 8 | 12 16 | 20 24 28 | 32 36 | 40 ..., and an epoch has 10.
    assert [schedule("epoch").round_of(iteration) for iteration in range(12)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert [schedule("epoch").bounds(round) for round in range(5)] == [(0, 3), (3, 5), (5, 8), (8, 10), (10, 12)]


def test_a_batch_larger_than_an_epoch_skips_no_round() -> None:
    small = schedule("epoch", train_iters=4, samples=3, batch=8)
    assert [small.round_of(iteration) for iteration in range(4)] == [0, 1, 2, 3]


def test_an_epoch_begins_with_the_batch_that_it_begins_in_while_batches_grow() -> None:
    # Batches of 2 2 2 4 4 4 4 begin at samples 0 2 4 | 6 | 10 14 | 18, and an epoch has 5.
    ramped = schedule("epoch", train_iters=7, samples=5, ramp=(2, 2, 6))
    assert [ramped.bounds(round) for round in range(4)] == [(0, 3), (3, 4), (4, 6), (6, 7)]


@pytest.mark.parametrize("ramp", [(), (1, 1, 13)])
@pytest.mark.parametrize("interval", ["stage", "epoch", "1", "3", "7"])
def test_bounds_tile_the_stage_and_agree_with_round_of(interval: str, ramp: tuple[int, ...]) -> None:
    for train_iters, samples, batch, first in itertools.product((1, 2, 11), (1, 3, 8, 9), (2, 8), (0, 5)):
        if ramp and interval == "epoch" and samples < batch:
            continue  # refused: batches that outgrow an epoch would pass over rounds
        rounds = schedule(interval, train_iters=train_iters, samples=samples, batch=batch, first_round=first, ramp=ramp)
        bounds = [rounds.bounds(first + index) for index in range(rounds.rounds)]
        found = [iteration for start, stop in bounds for iteration in range(start, stop)]
        assert found == list(range(train_iters))
        for index, (start, stop) in enumerate(bounds):
            assert start < stop
            assert {rounds.round_of(iteration) for iteration in range(start, stop)} == {first + index}


def test_after_the_last_iteration_the_last_round_holds() -> None:
    assert schedule("6").round_of(12) == 1
    assert schedule("6", train_iters=0).round_of(0) == 0
    assert schedule("6", train_iters=0).rounds == 1


def test_a_round_of_another_stage_is_refused() -> None:
    with pytest.raises(AssertionError, match="round 1 is not of this stage"):
        schedule("6", first_round=2).bounds(1)
