"""One pass of megatron-core's pipeline schedule over the micro-batches of a step."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hft_megatron.data.batches import StepBatch
from hft_megatron.objectives.objective import ForwardStep


def run_schedule(
    forward_step: ForwardStep, chunks: Sequence[torch.nn.Module], batch: StepBatch, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """The reports of this rank's micro-batches, empty off the last stage; every rank calls it."""
    # Each virtual chunk walks over the same micro-batches on its own.
    iterators: list[Iterator[Any]] = [iter(batch.micro_batches) for _ in chunks]
    reports: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batch.micro_batches),
        seq_length=batch.seq_length,
        micro_batch_size=batch.sequences,
        forward_only=forward_only,
    )
    return reports
