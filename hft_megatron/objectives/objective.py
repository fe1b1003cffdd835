"""What every objective offers the steps of a run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MicroBatch = Mapping[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, LossFunction]]
MeanLoss = Callable[[list[dict[str, Tensor]], torch.distributed.ProcessGroup, Any], float]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, as megatron-core's schedules call it, and the number that the log shows of it."""

    forward_step: ForwardStep
    """One micro-batch through one model chunk: its output, and the function that makes the loss of it."""
    mean_loss: MeanLoss
    """Of the reports of this rank's micro-batches, the data-parallel group and the device; on the last stage."""
