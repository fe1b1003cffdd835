"""One optimizer step and one validation, through megatron-core's pipeline schedules."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hft_megatron.data.batches import StepBatch
from hft_megatron.parallel.step_clock import OPTIMIZER, StepTimes
from hft_megatron.training.run import Run


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured on this rank."""

    loss: float | None
    """Mean per trained token of the global batch, in nats; None off the last pipeline stage."""
    grad_norm: float
    """Before clipping, over training parameters."""
    times: StepTimes
    """The whole step, with the assembly of its batch and the sum of the loss over ranks, and where it went."""
    reduce_scatter_bytes: int
    """Passed to reduce-scatter over data-parallel ranks since the step before ended."""
    all_gather_bytes: int
    """Filled by all-gather over data-parallel ranks since the step before ended.

    A gather that a validation or a checkpoint forces between two steps counts for the second, which then needs none.
    """


def train_step(run: Run) -> StepResult:
    """Takes the next global batch, accumulates its gradients, reduces them and updates what the plan trains."""
    traffic = run.wrapped.traffic
    traffic.clock.begin()
    batch = run.batches.step(run.state.consumed_samples)
    run.wrapped.zero_gradients()
    reports = _run_schedule(run, batch, forward_only=False)
    with traffic.clock.section(OPTIMIZER):
        updated, grad_norm, _ = run.wrapped.optimizer.step()
    assert updated, "without loss scaling every step updates"
    loss = _mean_loss(run, reports)
    times = traffic.clock.end()
    reduce_scatter_bytes, all_gather_bytes = traffic.take_bytes()
    return StepResult(
        loss=loss,
        grad_norm=float(grad_norm),
        times=times,
        reduce_scatter_bytes=reduce_scatter_bytes,
        all_gather_bytes=all_gather_bytes,
    )


def validation_loss(run: Run) -> float | None:
    """Mean loss per trained token over the validation data (or --eval-iters of it); None off the last stage."""
    assert run.validation is not None
    reports: list[dict[str, Tensor]] = []
    with run.wrapped.gathered_parameters(), torch.no_grad():
        for chunk in run.wrapped.chunks:
            chunk.eval()
        for batch in run.validation.steps(run.state.iteration):
            reports += _run_schedule(run, batch, forward_only=True)
        for chunk in run.wrapped.chunks:
            chunk.train()
    return _mean_loss(run, reports)


def _run_schedule(run: Run, batch: StepBatch, *, forward_only: bool) -> list[dict[str, Tensor]]:
    """One pass of the pipeline; the reports of this rank's micro-batches, empty off the last stage."""
    chunks = list(run.wrapped.chunks)
    # Each virtual chunk walks over the same micro-batches on its own.
    iterators: list[Iterator[Any]] = [iter(batch.micro_batches) for _ in chunks]
    reports: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=run.objective.forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batch.micro_batches),
        seq_length=batch.seq_length,
        micro_batch_size=batch.sequences,
        forward_only=forward_only,
    )
    return reports


def _mean_loss(run: Run, reports: list[dict[str, Tensor]]) -> float | None:
    placement = run.placement
    if placement.pipeline_rank < placement.pipeline_size - 1:
        return None
    return run.objective.mean_loss(reports, placement.groups.dp, placement.device)
