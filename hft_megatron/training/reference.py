"""The reference model of preference tuning, in three ways that give the same losses.

The log-probabilities of a batch's answers come from a table made before training (``precompute``), from a second
forward pass through the policy with its trained half put back (``shared``: the resting half is the reference's own),
or from a second model (``model``).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

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
_PARTS = 100
"""How often a pass keeps what it has, so that a stop loses a hundredth of it."""


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
    *,
    begun: Tensor | None,
    keep_part: Callable[[Tensor], object],
) -> Tensor:
    """One pass over ``batches``, which hold every pair: (pairs, 2) fp64 on every rank. Collective.

    Of a pair that comes in more than one batch the numbers of the first count. Every hundredth of the way ``keep_part``
    gets the table so far, NaN where there is nothing yet; ``begun`` is such a table of a pass that was stopped.
    """
    table = torch.full((pairs, 2), torch.nan, dtype=torch.float64) if begun is None else begun.clone()
    is_there = ~table[:, 0].isnan()
    new: list[tuple[Tensor, Tensor]] = []
    speaks = placement.pipeline_rank == placement.pipeline_size - 1 and placement.tensor_rank == 0
    came, part, line = 0, max(1, pairs // _PARTS), max(1, pairs // _PROGRESS_LINES)

    def fill_and_say() -> None:
        before = int(is_there.sum())
        _fill(table, is_there, new, placement)
        if (now := int(is_there.sum())) // line > before // line:
            announce(f"  reference log-probabilities: {now} of {pairs} pairs")

    for batch in batches:
        numbers = torch.cat([micro_batch["pairs"] for micro_batch in batch.micro_batches])
        lacked = _on_all((~is_there[numbers]).sum() if speaks else torch.tensor(0), placement)
        if lacked == 0:
            continue
        log_probs = reference_pass(chunks, batch)
        if speaks:
            new.append((numbers, torch.cat(log_probs).cpu()))
        came += lacked
        if came >= part:
            fill_and_say()
            keep_part(table)
            new, came = [], 0
    fill_and_say()
    assert is_there.all(), "the batches hold every pair"
    return table


def _on_all(count: Tensor, placement: Placement) -> int:
    """The sum over ranks, which hold different numbers of pairs: what all decide alike must not be a rank's own."""
    total = count.to(device=placement.device, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def _fill(table: Tensor, is_there: Tensor, new: Sequence[tuple[Tensor, Tensor]], placement: Placement) -> None:
    """Into every rank's ``table`` what all ranks' batches since the last call gave, the first of a pair."""
    everyone: list[Sequence[tuple[Tensor, Tensor]]] = [new] * placement.world_size
    dist.all_gather_object(everyone, new)
    # Batch by batch, as training would meet the pairs, and not rank by rank.
    in_turn = [found for batch in zip(*(part for part in everyone if part), strict=True) for found in batch]
    if not in_turn:
        return
    numbers, first = np.unique(torch.cat([found[0] for found in in_turn]).numpy(), return_index=True)
    values = torch.cat([found[1] for found in in_turn])[torch.from_numpy(first)]
    lacked = torch.from_numpy(numbers)[~is_there[numbers]]
    table[lacked] = values[~is_there[numbers]]
    is_there[lacked] = True
