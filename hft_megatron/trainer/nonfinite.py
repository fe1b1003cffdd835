"""Infinite and undefined numbers: where a step first had them, and whether the run ends or skips the step.

A step checks only the norm of the gradients, in which the losses have a term. Only when it is not finite do ranks check
every tensor, in the order of cause: weights, losses of micro-batches and the activations that they come from, gradients
from the head down. Weights are checked before every checkpoint and at the end as well.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from hft_megatron.checkpoint.folders import newest_in_words
from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.errors import RunFailed
from hft_megatron.hft.units import forward_position
from hft_megatron.model.linear import SharedInputColumnParallel
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import host_name
from hft_megatron.trainer.method import run_schedule
from hft_megatron.trainer.run import Run

_WEIGHT, _LOSS, _GRADIENT = range(3)
"""Kinds of findings, in the order of cause."""


@dataclass(frozen=True, kw_only=True, order=True)
class _Finding:
    """A finding of one rank; the smallest of all ranks' is the first in the order of cause."""

    kind: int
    place: int
    """Position of a weight's or an activation's unit in the forward pass, of a gradient's in the backward pass; the
    number of a loss's micro-batch."""
    rank: int
    where: str
    unit: str = ""
    data_rank: int = 0


def leave_out_or_fail(run: Run, batch: StepBatch, reports: Sequence[dict[str, Tensor]], norm: float) -> None:
    """Announces where the step's infinite or undefined number is, if the step may be skipped; collective.

    ``reports`` are those of this rank's micro-batches, ``norm`` is that of the gradients. Raises the same RunFailed on
    every rank where --skip-nonfinite-steps is used up, and where the weights themselves are not finite.
    """
    first = _first_of_all([*_of_weights(run), *_of_losses(run, reports), *_of_gradients(run)])
    found, samples = _in_words(run, batch, first, norm), run.batches.names(_samples(run, first))
    iteration, allowed = run.state.iteration + 1, run.config.training.skip_nonfinite_steps
    skipped = len(run.state.skipped_iterations) - len(run.state.asked_to_skip)
    if first is not None and first.kind == _WEIGHT:
        raise RunFailed(f"iteration {iteration}: {found}; {_weights_are_lost(run)}")
    if skipped < allowed:
        run.announce(
            f"> iteration {iteration} is skipped ({skipped + 1} of --skip-nonfinite-steps {allowed}): {found}; "
            f"its samples are {samples}"
        )
        return
    advice = f"try a lower --lr, or --skip-nonfinite-steps {allowed + 1} to skip such steps"
    if skipped:
        advice = (
            f"since all {skipped} of --skip-nonfinite-steps are used up, training may have diverged: resume from an "
            "earlier checkpoint with a lower --lr"
        )
    raise RunFailed(
        f"iteration {iteration}: {found}, so no update was made, which would have destroyed the model; check "
        f"{samples} and the losses before this iteration, and {advice}."
    )


def check_weights(run: Run) -> None:
    """Raises the same RunFailed on every rank where a weight is infinite or undefined; collective, one read per rank.

    Where the gather of weights is still pending, each rank checks at least the part that it has updated.
    """
    largest = get_total_norm([slot.parameter.detach() for slot in parameter_slots(run.wrapped.modules)], torch.inf)
    first = _first_of_all([] if bool(largest.isfinite()) else _of_weights(run))
    if first is not None:
        raise RunFailed(
            f"after iteration {run.state.iteration}: the weight of {first.unit} is not finite {first.where}; "
            f"{_weights_are_lost(run)}"
        )


def _weights_are_lost(run: Run) -> str:
    folder = run.config.checkpoint.save
    kept = "" if folder is None else f" ({newest_in_words(folder)})"
    return f"resume from a checkpoint of an earlier iteration{kept}, with a lower --lr."


# --- findings of this rank


def _of_weights(run: Run) -> list[_Finding]:
    units = [slot.unit for slot in parameter_slots(run.wrapped.modules) if not slot.parameter.isfinite().all()]
    return [_finding(run, _WEIGHT, forward_position(unit), unit) for unit in units]


def _of_losses(run: Run, reports: Sequence[dict[str, Tensor]]) -> list[_Finding]:
    bad = [not all(bool(each.isfinite().all()) for each in report.values()) for report in reports]
    return [_finding(run, _LOSS, number) for number, is_bad in enumerate(bad) if is_bad]


def _of_gradients(run: Run) -> list[_Finding]:
    units = run.wrapped.shards.nonfinite_gradients()
    return [_finding(run, _GRADIENT, -forward_position(unit), unit) for unit in units]


def _finding(run: Run, kind: int, place: int, unit: str = "") -> _Finding:
    placement = run.placement
    where = f"on rank {placement.rank} on {host_name()} ({placement.coordinates})"
    return _Finding(kind=kind, place=place, rank=placement.rank, where=where, unit=unit, data_rank=placement.data_rank)


def _first_of_all(mine: Sequence[_Finding]) -> _Finding | None:
    return min((one for one in gathered(min(mine, default=None)) if one is not None), default=None)


# --- wording


def _in_words(run: Run, batch: StepBatch, first: _Finding | None, norm: float) -> str:
    if first is None:
        return f"the norm of the gradients is {norm:g}, and each of them is finite: their squares are too large to add"
    if first.kind == _WEIGHT:
        since = f" since the step of iteration {run.state.iteration}" if run.state.iteration else ""
        return f"the weight of {first.unit} is not finite{since} {first.where}"
    if first.kind == _GRADIENT:
        summed = ", summed over data-parallel ranks," if run.placement.data_size > 1 else ""
        return f"the gradient of {first.unit}{summed} is not finite {first.where}"
    micro_batch = f"the loss of micro-batch {first.place + 1} of {len(batch.micro_batches)} is not finite {first.where}"
    source = _first_of_all(_of_activations(run, batch, first))
    return micro_batch if source is None else f"{micro_batch}, first in the output of {source.unit} {source.where}"


def _samples(run: Run, first: _Finding | None) -> range | list[int]:
    """The run's samples that the finding may come from: those of its micro-batch for a loss, else the step's."""
    consumed = run.state.consumed_samples
    share = run.batches.share.after(consumed)
    if first is None or first.kind != _LOSS:
        return run.coming_samples
    of_rank: BatchShare = replace(share, data_parallel_rank=first.data_rank)
    start = consumed + of_rank.micro_batch_starts()[first.place]
    return range(start, start + share.micro_batch_size)


# --- the forward pass once more


def _of_activations(run: Run, batch: StepBatch, loss: _Finding) -> list[_Finding]:
    """Units whose output is the first on this rank that is not finite, in a second forward pass of the micro-batch."""
    placement, units = run.placement, list[str]()
    # The interleaved schedule needs a multiple of the stages.
    repeats = placement.pipeline_size if placement.virtual_stages > 1 else 1
    again = replace(batch, micro_batches=[batch.micro_batches[loss.place]] * repeats)
    with run.wrapped.gathered_parameters(), _watched(run, units), torch.no_grad():
        run_schedule(run.objective.forward_step, run.wrapped.chunks, again, forward_only=True)
    if placement.data_rank != loss.data_rank:
        return []
    return [_finding(run, _LOSS, forward_position(unit), unit) for unit in units]


@contextlib.contextmanager
def _watched(run: Run, found: list[str]) -> Iterator[None]:
    """Within it, units with a finite input and an output that is not finite are added to ``found``."""

    def looking_for(units: Sequence[str]) -> Any:
        def look(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [each for each in inputs if isinstance(each, Tensor)]
            if all(_is_finite(each) for each in tensors):
                outputs = output if isinstance(output, tuple) else (output,)
                found.extend(unit for unit, each in zip(units, outputs, strict=False) if not _is_finite(each))

        return look

    hooks = [module.register_forward_hook(looking_for(units)) for module, units in _modules_of_units(run)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _modules_of_units(run: Run) -> Iterator[tuple[torch.nn.Module, list[str]]]:
    """Modules with the units whose outputs they return, in that order."""
    for chunk in run.wrapped.modules:
        owners: dict[str, list[str]] = {}
        for slot in parameter_slots([chunk]):
            name = slot.local_name.removesuffix(".weight")
            group = name.rpartition(".")[0]
            owner = group if isinstance(chunk.get_submodule(group), SharedInputColumnParallel) else name
            owners.setdefault(owner, []).append(slot.unit)
        for owner, units in owners.items():
            yield chunk.get_submodule(owner), units


def _is_finite(tensor: Any) -> bool:
    return not isinstance(tensor, Tensor) or not tensor.is_floating_point() or bool(tensor.isfinite().all())
