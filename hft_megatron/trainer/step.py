"""One optimizer step, through megatron-core's pipeline schedules."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hft_megatron.model.adapters import seed_dropout
from hft_megatron.optimizer.distributed import NonFiniteNorm
from hft_megatron.parallel.step_clock import OPTIMIZER, StepTimes, timed_collectives
from hft_megatron.tracking.tracker import EWC_PENALTY
from hft_megatron.trainer.method import means_of, run_schedule
from hft_megatron.trainer.nonfinite import leave_out_or_fail
from hft_megatron.trainer.run import Run


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Measurements of one step on this rank."""

    updated: bool
    """False for a step that --skip-nonfinite-steps skipped: its loss or gradients are infinite or undefined."""
    loss: float | None
    """Mean over the global batch, per trained token (nats) or per pair; None off the last pipeline stage."""
    measured: Mapping[str, float]
    """The objective's means over the global batch, by their names in the log, and the value of the optimizer's penalty
    before the step, if it has one; empty off the last stage."""
    grad_norm: float
    """Norm of the gradients of trainable parameters before clipping, with the penalty's gradient."""
    tokens: int
    """Positions of the global batch that examples fill; padding is not counted."""
    squared_lengths: int
    """Sum of the examples' squared positions over the global batch."""
    times: StepTimes
    """Times of the whole step, with the assembly of its batch and the sum of the loss over ranks, and of its parts."""
    reduce_scatter_bytes: int
    """Bytes passed to reduce-scatter over data-parallel ranks since the step before ended."""
    all_gather_bytes: int
    """Bytes filled by all-gather over data-parallel ranks since the step before ended.

    A gather that a validation or a checkpoint forces between two steps counts for the second, which then needs none.
    """


def train_step(run: Run) -> StepResult:
    """Takes the next global batch, accumulates its gradients, reduces them and updates the trainable units.

    Raises RunFailed where its loss or gradients are infinite or undefined, unless such a step is skipped.
    """
    traffic = run.wrapped.traffic
    traffic.clock.begin()
    batch = run.batches.step(run.state.consumed_samples)
    if run.reference is not None:
        run.reference.attach(batch)
    run.wrapped.zero_gradients()
    seed_dropout(
        run.wrapped.modules[0].shape.adapters,
        seed=run.config.training.seed,
        iteration=run.state.iteration,
        placement=run.placement,
    )
    with timed_collectives(traffic.clock, run.placement.groups.tp):
        reports = run_schedule(run.objective.forward_step, run.wrapped.chunks, batch, forward_only=False)
    level = run.config.training.empty_unused_memory_level
    if level >= 1:
        torch.cuda.empty_cache()
    grad_norm, failure = 0.0, None
    run.wrapped.shards.note_losses([measured for report in reports for measured in report.values()])
    with traffic.clock.section(OPTIMIZER):
        try:
            updated, grad_norm, _ = run.wrapped.optimizer.step()
            assert updated, "without loss scaling every step updates"
        except NonFiniteNorm as found:
            failure = found
    if failure is not None:
        grad_norm = failure.norm
        leave_out_or_fail(run, batch, reports, failure.norm)
    if level >= 2:
        torch.cuda.empty_cache()
    measured = means_of(run.objective, reports, run.placement)
    penalty = run.wrapped.shards.penalty
    if penalty is not None:
        value = penalty.value()
        # Where the other means are.
        measured |= {EWC_PENALTY: value} if measured else {}
    times = traffic.clock.end()
    reduce_scatter_bytes, all_gather_bytes = traffic.take_bytes()
    return StepResult(
        updated=failure is None,
        loss=measured.get(run.objective.loss_name),
        measured=measured,
        grad_norm=float(grad_norm),
        tokens=batch.tokens,
        squared_lengths=batch.squared_lengths,
        times=times,
        reduce_scatter_bytes=reduce_scatter_bytes,
        all_gather_bytes=all_gather_bytes,
    )
