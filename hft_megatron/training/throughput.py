"""How fast a run is: tokens and FLOPs per second and rank, the memory held at most, and the time that is left."""

import resource
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import median

import torch

from hft_megatron.config.derived import sequence_length, train_iters
from hft_megatron.optimizer.flops import StepFlops, step_flops
from hft_megatron.tracking import tracker as names
from hft_megatron.training.run import Run
from hft_megatron.training.step import StepResult

RECENT_STEPS = 100
"""Of their times the median is taken for the time left: a slow step now and then doesn't show in it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all ranks together did in a step, or in several."""

    tokens: int
    """Positions that examples fill, trained or not; padding is not counted."""
    model_flops: int
    actual_flops: int
    milliseconds: float

    def __add__(self, other: "Work") -> "Work":
        return Work(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


def flops_of(run: Run) -> StepFlops:
    """The counts of a step under the run's present plan, whose micro-batches are as long as they can be."""
    config = run.config
    in_memory = run.reference is not None and config.dpo.dpo_reference != "precompute"
    shape, plan = run.wrapped.modules[0].shape, run.wrapped.plan
    # A pair is two sequences.
    sequences = config.training.micro_batch_size * (2 if run.reference is not None else 1)
    return step_flops(
        shape,
        config.parallel,
        config.training,
        plan.trains,
        micro_batch_tokens=sequences * sequence_length(config.training, shape),
        vocab_multiple=config.model.make_vocab_size_divisible_by,
        reference_forward=in_memory,
    )


def work_of(result: StepResult, flops: StepFlops) -> Work:
    """What a step that took place under ``flops`` did."""
    return Work(
        tokens=result.tokens,
        model_flops=flops.model.of(result.tokens, result.squared_lengths),
        actual_flops=flops.actual.of(result.tokens, result.squared_lengths),
        milliseconds=result.times.total,
    )


def rates(steps: Sequence[Work], world_size: int) -> dict[str, float]:
    """Tokens per second, and model and actual TFLOP per second, of one rank, by their names in the log."""
    seconds = sum(step.milliseconds for step in steps) / 1e3
    per_rank = seconds * world_size
    return {
        names.TOKENS_PER_SECOND: sum(step.tokens for step in steps) / per_rank,
        names.THROUGHPUT: sum(step.model_flops for step in steps) / per_rank / 1e12,
        names.ACTUAL_THROUGHPUT: sum(step.actual_flops for step in steps) / per_rank / 1e12,
    }


def peak_memory() -> dict[str, float]:
    """Gigabytes (1e9) that this rank held at most since it started, under the name that says of what.

    Of the device what tensors took, without the allocator's reserve and CUDA's own; elsewhere of the whole process.
    Asks the host alone.
    """
    if torch.cuda.is_available():
        return {names.DEVICE_PEAK: torch.cuda.max_memory_allocated() / 1e9}
    # Linux counts in units of 1024 bytes.
    return {names.PROCESS_PEAK: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


@dataclass
class TimeLeft:
    """Estimates how long the steps that are left will take; validations and checkpoints are not in it."""

    _recent: "deque[float]" = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def add(self, result: StepResult) -> None:
        """A step is done."""
        self._recent.append(result.times.total)

    def seconds(self, run: Run) -> float:
        """From the run's iteration to its last."""
        return (train_iters(run.config.training) - run.state.iteration) * median(self._recent) / 1e3
