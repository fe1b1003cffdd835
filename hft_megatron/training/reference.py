"""The reference model of preference tuning, in three ways that give the same losses.

The log-probabilities of a batch's answers come from a table made before training (``precompute``), from a second
forward pass through the policy with its trained half put back (``shared``: the resting half is the reference's own),
or from a second model (``model``).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.conversion.save import Announce
from hft_megatron.data.batches import StepBatch
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.objectives.dpo import LOG_PROBS, log_prob_step
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.training.hook import Hook
from hft_megatron.training.run import Run
from hft_megatron.training.schedule import run_schedule

_PROGRESS_LINES = 10


class PrecomputedReference:
    """Looks log-probabilities up by the numbers of the pairs."""

    def __init__(self, table: Tensor) -> None:
        """``table`` (pairs, 2) fp64: those of training, then those of validation."""
        self._table = table

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return _bytes_of([self._table])

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``."""
        for micro_batch in batch.micro_batches:
            micro_batch["reference"] = self._table[micro_batch["pairs"]]


class ModelReference:
    """Asks a second model of the same layout."""

    def __init__(self, chunks: Sequence[LlamaModel]) -> None:
        self._chunks = chunks

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return _bytes_of(weight for chunk in self._chunks for weight in chunk.parameters())

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        _attach(batch, reference_pass(self._chunks, batch))


class SharedReference(Hook):
    """Asks the policy itself, with the units that have trained put back for the pass.

    What has never trained is the reference's already, so only the trained share of the weights is there twice.
    """

    def __init__(self, chunks: Sequence[LlamaModel], trained: frozenset[str]) -> None:
        """``chunks`` hold the reference's weights now; of the units ``trained`` in earlier rounds they are kept."""
        self._chunks = chunks
        self._kept: dict[Parameter, Tensor] = {}
        self._wrapped: WrappedModel | None = None
        self._keep(trained)

    def _keep(self, units: frozenset[str]) -> None:
        for slot in parameter_slots(self._chunks):
            if slot.unit in units and slot.parameter not in self._kept:
                self._kept[slot.parameter] = slot.parameter.detach().clone()

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return _bytes_of(self._kept.values())

    def at_round_start(self, run: Run) -> None:
        self._wrapped = run.wrapped
        self._keep(run.wrapped.plan.training)

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        assert self._wrapped is not None, "a round begins before its first step"
        with self._wrapped.gathered_parameters(), self._put_back():
            log_probs = reference_pass(self._chunks, batch)
        _attach(batch, log_probs)

    @contextlib.contextmanager
    def _put_back(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges values and not tensors: parameters are views of buffers, where gathers and optimizer look."""
        for parameter, kept in self._kept.items():
            held = parameter.clone()
            parameter.copy_(kept)
            kept.copy_(held)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reference_pass(chunks: Sequence[LlamaModel], batch: StepBatch) -> list[Tensor]:
    """Log-probabilities (nats, fp64) of each micro-batch's answers, (pairs, 2); none off the last stage. Collective."""
    training = [chunk.training for chunk in chunks]
    with torch.no_grad():
        for chunk in chunks:
            chunk.eval()
        reports = run_schedule(log_prob_step, chunks, batch, forward_only=True)
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
    return [report[LOG_PROBS] for report in reports]


def _attach(batch: StepBatch, log_probs: Sequence[Tensor]) -> None:
    if not log_probs:
        return  # only the last stage makes a loss
    for micro_batch, found in zip(batch.micro_batches, log_probs, strict=True):
        micro_batch["reference"] = found


def log_prob_table(
    chunks: Sequence[LlamaModel],
    batches: Iterable[StepBatch],
    pairs: int,
    placement: Placement,
    announce: Announce,
) -> Tensor:
    """One pass over ``batches``, which hold every pair: (pairs, 2) fp64 on every rank. Collective.

    Of a pair that comes in more than one batch the numbers of the first count.
    """
    steps: list[Tensor] = []
    numbers: list[Tensor] = []
    found: list[Tensor] = []
    speaks = placement.pipeline_rank == placement.pipeline_size - 1 and placement.tensor_rank == 0
    done, next_line = 0, pairs // _PROGRESS_LINES
    for step, batch in enumerate(batches):
        log_probs = reference_pass(chunks, batch)
        if speaks:
            steps += [torch.full_like(micro_batch["pairs"], step) for micro_batch in batch.micro_batches]
            numbers += [micro_batch["pairs"] for micro_batch in batch.micro_batches]
            found += [values.cpu() for values in log_probs]
        done += sum(len(micro_batch["pairs"]) for micro_batch in batch.micro_batches) * placement.data_size
        if done >= next_line:
            announce(f"  reference log-probabilities: {min(done, pairs)} of {pairs} pairs")
            next_line += max(1, pairs // _PROGRESS_LINES)
    mine = (torch.cat(steps), torch.cat(numbers), torch.cat(found)) if speaks else None
    everyone = [mine] * placement.world_size
    dist.all_gather_object(everyone, mine)
    all_steps, all_numbers, values = (
        torch.cat(column) for column in zip(*(part for part in everyone if part is not None), strict=True)
    )
    in_turn = torch.argsort(all_steps, stable=True)
    held, first = np.unique(all_numbers[in_turn].numpy(), return_index=True)
    assert np.array_equal(held, np.arange(pairs)), "the batches hold every pair"
    return values[in_turn][torch.from_numpy(first)]
