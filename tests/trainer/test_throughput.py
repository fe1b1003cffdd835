"""Rates, the memory held at most, and the time left. Run: pytest tests/trainer/test_throughput.py"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hft_megatron.config.batch_sizes import BatchSizes
from hft_megatron.config.derived import train_iters
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.flops import ExtraWork, Flops, StepFlops, step_flops
from hft_megatron.parallel.step_clock import StepTimes
from hft_megatron.trainer.bill import RECENT_STEPS, TimeLeft, Work, flops_of, peak_memory, rates, work_of
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.step import StepResult
from tests.costs.test_rank_costs import SHAPE

RESULT = StepResult(
    updated=True,
    loss=None,
    measured={},
    grad_norm=1.0,
    tokens=100,
    squared_lengths=3000,
    times=StepTimes(total=500.0, sections={}),
    reduce_scatter_bytes=0,
    all_gather_bytes=0,
)


SIZE = 4
"""Samples of a step."""


def run_of(config: RunConfig, *, iteration: int = 0, reference: object = None) -> Run:
    wrapped = SimpleNamespace(modules=[SimpleNamespace(shape=SHAPE)], plan=SimpleNamespace(trains=lambda unit: True))
    state: Any = SimpleNamespace(iteration=iteration)
    length, batches = train_iters(config.training), BatchSizes(full=SIZE)
    state.consumed_samples = iteration * SIZE
    rounds = SimpleNamespace(schedule=SimpleNamespace(batches=batches))
    run = SimpleNamespace(
        config=config,
        length=length,
        rounds=rounds,
        wrapped=wrapped,
        reference=reference,
        sequences_per_sample=1,
        state=state,
    )
    return cast(Run, run)


def test_a_rate_is_a_mean_over_time_and_a_share_of_one_rank() -> None:
    flops = StepFlops(
        model=Flops(per_token=10**10, per_squared_length=10**9), actual=Flops(per_token=10**9, per_squared_length=0)
    )
    quick = work_of(RESULT, flops)
    assert quick == Work(tokens=100, model_flops=4 * 10**12, actual_flops=10**11, milliseconds=500.0)
    slow = replace(quick, milliseconds=1500.0)
    expected = {
        "tokens per GPU (tokens/s/GPU)": 25.0,
        "throughput per GPU (TFLOP/s/GPU)": 1.0,
        "actual throughput per GPU (TFLOP/s/GPU)": 0.025,
    }
    assert rates([quick, slow], world_size=4) == pytest.approx(expected)
    assert rates([quick + slow], world_size=4) == pytest.approx(expected)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_what_is_asked_before_a_step_is_forward_passes_more(passes: int) -> None:
    config = RunConfig()
    full = step_flops(SHAPE, ParallelConfig(), TrainingConfig(), lambda unit: True, micro_batch_tokens=8)
    assert flops_of(run_of(config)) == full
    found = flops_of(run_of(config, reference=SimpleNamespace(extra_work=ExtraWork(forward_passes=passes))))
    assert found.model == full.model
    assert 3 * found.actual.per_token == (3 + passes) * full.model.per_token


def test_the_time_left_follows_the_median_of_recent_steps() -> None:
    left = TimeLeft()
    for milliseconds in [9000.0] * RECENT_STEPS + [500.0] * (RECENT_STEPS - 1) + [60_000.0]:
        left.add(replace(RESULT, times=StepTimes(total=milliseconds, sections={})), run_of(RunConfig(), iteration=1))
    config = RunConfig(training=TrainingConfig(train_iters=300))
    assert left.seconds(run_of(config, iteration=200)) == 50.0
    assert left.seconds(run_of(config, iteration=300)) == 0.0


def test_the_peak_is_the_devices_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 69_500_000_000)
    assert peak_memory() == {"max allocated memory (GB)": 69.5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [(name, size)] = peak_memory().items()
    assert name == "max resident memory of the process (GB)"
    assert 0.05 < size < 100
