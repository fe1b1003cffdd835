"""Parts that a method (sft, pretrain and so on) gives a run: its data and its objective; and passes through a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import MethodName
from hft_megatron.config.run import RunConfig
from hft_megatron.data.batches import BatchShare, StepBatch, TrainingSteps, ValidationSteps
from hft_megatron.data.order import SampleStream
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.parallel.groups import Placement

if TYPE_CHECKING:
    from hft_megatron.trainer.inputs import Inputs
    from hft_megatron.trainer.loop import Hook
    from hft_megatron.trainer.run import Reference


MicroBatch = Mapping[str, Tensor]
LossFunction = Callable[[Any], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""The last stage's output -> the loss, summed; its divisor over the global batch (int); and values for the log."""
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Any, LossFunction]]
Measure = Callable[[list[dict[str, Tensor]], torch.distributed.ProcessGroup, Any], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The function that is minimised, in the form of megatron-core's schedules, and its numbers in the log."""

    loss_name: str
    """Name of the loss in the log and among the numbers of ``measure``."""
    forward_step: ForwardStep
    """One micro-batch through one model chunk: its output, and the function that computes the loss from it."""
    measure: Measure
    """Means by name, from the reports of this rank's micro-batches, the data-parallel group and the device; on the last
    stage."""
    unweighted: "Objective | None" = None
    """Objective in its place where a model is only measured (validation, Fisher information) and nothing is attached to
    micro-batches beforehand; None: itself."""


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


def forward_pass(
    forward_step: ForwardStep, chunks: Sequence[torch.nn.Module], batch: StepBatch
) -> list[dict[str, Tensor]]:
    """``run_schedule`` without gradients, with the models in evaluation mode."""
    training = [chunk.training for chunk in chunks]
    with torch.no_grad():
        for chunk in chunks:
            chunk.eval()
        reports = run_schedule(forward_step, chunks, batch, forward_only=True)
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
    return reports


def means_of(objective: Objective, reports: list[dict[str, Tensor]], placement: Placement) -> dict[str, float]:
    """The objective's means over the reports of all ranks, by name; empty off the last stage. Collective."""
    if placement.pipeline_rank < placement.pipeline_size - 1:
        return {}
    return objective.measure(reports, placement.groups.dp, placement.device)


class RunData(Protocol):
    """Training and validation data of a run, the same on every rank."""

    @property
    def digest(self) -> str | None:
        """sha256 of the training data; None where nothing is trained."""

    @property
    def valid_digests(self) -> Mapping[str, str]:
        """sha256 of the validation data, by the names of the sources; equal on all ranks."""

    @property
    def order_digest(self) -> str | None:
        """Digest of the order of the training samples, where seed and data alone don't decide it."""

    @property
    def samples(self) -> SampleStream | None:
        """The training samples in their order, where it has epochs."""

    @property
    def uses_chat_template(self) -> bool:
        """Return whether the chat template has rendered any of the training data."""

    def describe(self) -> list[str]:
        """Lines for the log."""

    def training(self, share: BatchShare) -> TrainingSteps:
        """This rank's part of every training step."""

    def validation(self, share: BatchShare) -> Mapping[str, ValidationSteps]:
        """This rank's part of every validation, by the names of the sources; empty where there are none."""


ReadData = Callable[[RunConfig, Tokenizer, ModelShape, int], RunData]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    name: MethodName
    objective: Callable[[RunConfig], Objective]
    """Builds the objective from the options."""
    read_data: ReadData
    """Takes the resolved options, tokenizer, shape and world size; UserError for a mistake in the data."""
    notes: Callable[[RunConfig], list[str]] = lambda config: []
    """Lines for the log about its options."""
    sequences_per_sample: int = 1
    """Sequences of a sample that the model is given, for the memory of a micro-batch: a pair is two."""
    reference: "Callable[..., Reference | None] | None" = None
    """Builds the reference that is used before the passes of a step, for a method with one: takes the run's inputs,
    model chunks, rounds, share of a batch, placement and announcer, before a checkpoint fills the chunks;
    collective."""
    last_hooks: "Callable[[Inputs, Placement], Sequence[Hook]]" = lambda inputs, placement: ()
    """Builds the hooks that run after all others and the last checkpoint; collective, before a model is built."""
