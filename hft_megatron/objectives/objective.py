"""What every objective offers the steps of a run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MicroBatch = Mapping[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""The last stage's output -> what is minimised, summed; what that is divided by over the global batch (int); and what
is kept for the log."""
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, LossFunction]]
Measure = Callable[[list[dict[str, Tensor]], torch.distributed.ProcessGroup, Any], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, as megatron-core's schedules call it, and the numbers that the log shows of it."""

    loss_name: str
    """Of the loss, in the log and among the numbers of ``measure``."""
    forward_step: ForwardStep
    """One micro-batch through one model chunk: its output, and the function that makes the loss of it."""
    measure: Measure
    """Means by name, of the reports of this rank's micro-batches, the data-parallel group and the device; on the last
    stage."""
