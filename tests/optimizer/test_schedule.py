"""Learning rates and weight decays against numbers worked out by hand."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hft_megatron.config.batch_sizes import BatchSizes
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.hft.rounds import RoundSchedule
from hft_megatron.optimizer.rounds import LearningRate, Span, span_of_round


def schedule(options: dict[str, Any], train_iters: int, iteration: int = 0) -> Iterator[tuple[float, float, float]]:
    """Of each update from ``iteration`` on: its rate, its weight decay, and the rate that is reported after it."""
    group = {"params": [], "lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0, "lr_mult": 1.0, "default_config": True}
    settings = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.2, "lr_decay_style": "constant"} | options)
    span = Span(length=train_iters, position=lambda iteration: iteration)
    rate = LearningRate(SimpleNamespace(param_groups=[group]), settings, span, iteration)
    for done in range(iteration, train_iters):
        lr, weight_decay = group["lr"], group["weight_decay"]
        rate.advance(done)
        yield lr, weight_decay, rate.last


def rates(options: dict[str, Any], train_iters: int, iteration: int = 0) -> list[float]:
    """The rates of updates from ``iteration`` on."""
    return [rate for rate, *_ in schedule(options, train_iters, iteration)]


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"lr_decay_style": "linear"}, [1.0, 0.8, 0.6, 0.4]),
        ({"lr_decay_style": "cosine"}, [1.0, 0.8828427, 0.6, 0.3171573]),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 2}, [0.0, 0.5, 1.0, 0.6]),
        ({"lr_warmup_fraction": 0.5}, [0.0, 0.5, 1.0, 1.0]),
        ({"lr_warmup_iters": 2, "lr_warmup_init": 0.4}, [0.4, 0.7, 1.0, 1.0]),
        # lr x sqrt(warm-up / iteration), at least min_lr, and that after the decay.
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1, "min_lr": 0.55},
            [0.0, 1.0, 0.7071068, 0.5773503, 0.55, 0.55],
        ),
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1, "lr_decay_iters": 2},
            [0.0, 1.0, 0.7071068, 0.2, 0.2],
        ),
        # From iteration 2 (6 - 4) on, with x = 0, 1/4, 1/2, 3/4, 1: 0.2 + 0.8 x what comes down from 1 to 0.
        (WSD | {"lr_wsd_decay_style": "linear", "lr_decay_iters": 6}, [1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (WSD | {"lr_wsd_decay_style": "minus_sqrt"}, [1.0, 0.6, 0.4343146, 0.3071797]),
        (WSD | {"lr_wsd_decay_style": "cosine"}, [1.0, 0.8828427, 0.6, 0.3171573]),
        (WSD, [1.0, 0.7454343, 0.5313708, 0.3513656]),
        (WSD | {"lr_decay_iters": 6, "lr_warmup_iters": 2}, [0.0, 0.5, 1.0, 0.7454343, 0.5313708, 0.3513656, 0.2, 0.2]),
    ],
)
def test_rates_equal_megatrons_rule_by_hand(options, expected):
    found = list(schedule(options, train_iters=len(expected)))
    assert [rate for rate, *_ in found] == pytest.approx(expected, abs=1e-6)
    assert [reported for *_, reported in found] == [rate for rate, *_ in found]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight_decay": 0.3}, [0.3, 0.3, 0.3, 0.3]),
        ({"weight_decay_incr_style": "linear"}, [0.1, 0.2, 0.3, 0.4]),
        # 0.1 + 0.4 x (1 - cos(pi x iteration / 4)) / 2
        ({"weight_decay_incr_style": "cosine"}, [0.1, 0.1585786, 0.3, 0.4414214]),
        # The decay of the rate has nothing to do with it.
        ({"weight_decay_incr_style": "linear", "lr_decay_iters": 2, "lr_warmup_iters": 1}, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_weight_decays_equal_megatrons_rule_by_hand(options, expected):
    rising = {} if "weight_decay" in options else {"start_weight_decay": 0.1, "end_weight_decay": 0.5}
    found = [weight_decay for _, weight_decay, _ in schedule(options | rising, train_iters=4)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_a_resumed_schedule_continues_where_it_stood(style):
    options = {"lr_decay_style": style, "lr_warmup_iters": 2, "weight_decay_incr_style": "cosine"}
    options |= {"lr_wsd_decay_iters": 5, "start_weight_decay": 0.0, "end_weight_decay": 0.2}
    whole = list(schedule(options, train_iters=9))
    assert list(schedule(options, train_iters=9, iteration=4)) == whole[4:]
    assert len(set(whole)) == 9


def positions(
    hft: HFTConfig,
    interval: str,
    *,
    train_iters: int = 7,
    cycle: int | None = None,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
) -> list[tuple[int, int]]:
    """(position, length) in the schedule of every iteration of a run."""
    rounds = RoundSchedule(
        interval=interval, train_iters=train_iters, epoch_starts=range(train_iters + 1), batches=BatchSizes(full=1)
    )
    config = RunConfig(hft=hft, training=TrainingConfig(train_iters=train_iters), optimizer=optimizer)
    spans = [span_of_round(config, rounds, round, cycle=cycle) for round in range(rounds.rounds)]
    return [
        (spans[rounds.round_of(iteration)].position(iteration), spans[rounds.round_of(iteration)].length)
        for iteration in range(train_iters)
    ]


def test_one_schedule_over_the_run_does_not_see_rounds():
    assert positions(HFTConfig(), "3") == [(iteration, 7) for iteration in range(7)]


def test_a_part_of_a_longer_schedule_begins_where_the_part_before_it_ended():
    part = OptimizerConfig(lr_schedule_iters=20, lr_schedule_start=5)
    assert positions(HFTConfig(), "3", optimizer=part) == [(5 + iteration, 20) for iteration in range(7)]
    hift = positions(HFTConfig(hft_selection="hift"), "1", cycle=3, optimizer=part)
    assert hift == [(5, 20)] * 3 + [(8, 20)] * 3 + [(11, 20)]


def test_a_schedule_per_round_starts_anew_with_each_and_a_last_short_round_is_cut_off():
    expected = [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3), (2, 3), (0, 3)]
    assert positions(HFTConfig(hft_lr_schedule="round"), "3") == expected


def test_hifts_rate_moves_only_after_every_group_has_trained():
    hift = HFTConfig(hft_selection="hift")
    assert positions(hift, "1", cycle=3) == [(0, 7)] * 3 + [(3, 7)] * 3 + [(6, 7)]


def rates_of_rounds(hft: HFTConfig, skipped: tuple[int, ...], cycle: int | None = None) -> list[int]:
    """The position in the schedule of every iteration of a run that is started anew before each of them."""
    rounds = RoundSchedule(interval="3", train_iters=9, epoch_starts=range(10), batches=BatchSizes(full=1))
    found, config = [], RunConfig(hft=hft, training=TrainingConfig(train_iters=9))
    for iteration in range(9):
        before = tuple(number for number in skipped if number <= iteration)
        span = span_of_round(config, rounds, rounds.round_of(iteration), cycle=cycle, skipped_iterations=before)
        found.append(span.position(iteration))
    return found


def test_the_rate_waits_for_updates_and_not_for_iterations_that_were_left_out():
    assert rates_of_rounds(HFTConfig(), (2, 5)) == [0, 1, 1, 2, 3, 3, 4, 5, 6]
    assert rates_of_rounds(HFTConfig(hft_lr_schedule="round"), (2, 5)) == [0, 1, 1, 0, 1, 1, 0, 1, 2]
    assert rates_of_rounds(HFTConfig(hft_selection="hift"), (2, 5), cycle=2) == [0] * 6 + [4] * 3


RAMPED = TrainingConfig(train_samples=31, global_batch_size=4, rampup_batch_size=(2, 2, 6))


def test_under_train_samples_the_schedule_counts_samples_also_of_batches_that_grow() -> None:
    # Batches of 2 2 2 4 4 4 4 4 4.
    rounds = RoundSchedule(interval="3", train_iters=9, epoch_starts=(0,), batches=BatchSizes(full=4, ramp=(2, 2, 6)))
    starts = [0, 2, 4, 6, 10, 14, 18, 22, 26]
    for hft, cycle, expected in (
        (HFTConfig(), None, starts),
        (HFTConfig(hft_selection="hift"), 2, [0] * 6 + [18] * 3),
    ):
        config = RunConfig(hft=hft, training=RAMPED)
        spans = [span_of_round(config, rounds, round, cycle=cycle) for round in range(3)]
        assert [spans[rounds.round_of(iteration)].position(iteration) for iteration in range(9)] == expected
        assert {span.length for span in spans} == {31}
    span = span_of_round(RunConfig(training=RAMPED), rounds, 2, cycle=None, skipped_iterations=(2, 5))
    assert (span.position(5), span.position(7)) == (14 - 2 - 4, 22 - 2 - 4)


def test_a_round_of_its_own_schedule_is_as_long_as_its_samples() -> None:
    training = TrainingConfig(train_samples=30, global_batch_size=4)
    rounds = RoundSchedule(interval="3", train_iters=7, epoch_starts=(0,), batches=BatchSizes(full=4))
    config = RunConfig(hft=HFTConfig(hft_lr_schedule="round"), training=training)
    span = span_of_round(config, rounds, 1, cycle=None, skipped_iterations=(2, 4))
    assert (span.length, [span.position(iteration) for iteration in (4, 5, 6)]) == (12, [0, 4, 8])
