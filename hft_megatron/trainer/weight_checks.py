"""Checks of weights during training: frozen ones are unchanged, replicated ones equal; and the norm of all.

Replication follows from the names alone: a tensor-parallel part of a unit is on every data-parallel rank, a norm also
on every tensor-parallel rank, and a tied embedding on the first and on the last pipeline stage.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.errors import RunFailed
from hft_megatron.hft.on_ranks import Audit, fingerprint
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import host_name
from hft_megatron.parallel.launch import numbers_in_words
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.run import Run


@dataclass
class AuditRounds(Hook):
    """Verifies that frozen shards keep their bits: at the end of every round, and every ``interval`` steps."""

    interval: int | None
    _audit: Audit | None = None

    def at_round_start(self, run: Run) -> None:
        self._audit = Audit(list(parameter_slots(run.wrapped.modules)), run.wrapped.plan)

    def after_iteration(self, run: Run) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self.verify(run)

    def at_round_end(self, run: Run) -> None:
        self.verify(run)
        run.announce(f"audit of round {run.state.round}: no frozen shard has changed since the round began")

    def verify(self, run: Run) -> None:
        """Raises RunFailed on every rank when a frozen shard has changed."""
        assert self._audit is not None
        self._audit.verify(coordinates=run.placement.coordinates)


Part = tuple[int, int]
"""A unit's place in the plan, and the tensor-parallel rank whose part it is; 0 where it is not cut."""


@dataclass(frozen=True)
class CheckReplicas(Hook):
    """Compares the bits of all replicated weights every ``interval`` iterations.

    Costs two all-reduces of 8 bytes per unit and tensor-parallel rank, and a pass over the weights.
    """

    interval: int | None

    def after_iteration(self, run: Run) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            check_replicas(run)


def check_replicas(run: Run) -> None:
    """Raises the same RunFailed on every rank where ranks hold different bits of a weight; collective.

    It names the first such unit in the model's order and the ranks that differ from most others.
    """
    with run.wrapped.gathered_parameters():
        mine = _fingerprints(run)
    units, placement = run.wrapped.plan.units, run.placement
    limits = torch.iinfo(torch.int64)
    shape = (len(units), placement.tensor_size)
    lowest = torch.full(shape, limits.max, dtype=torch.int64, device=placement.device)
    highest = torch.full(shape, limits.min, dtype=torch.int64, device=placement.device)
    if mine:
        rows, columns = (torch.tensor(places, device=placement.device) for places in zip(*mine, strict=True))
        found = torch.tensor(list(mine.values()), dtype=torch.int64, device=placement.device)
        lowest[rows, columns] = highest[rows, columns] = found
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    # Parts that no rank holds, as the other parts of a norm, have the lowest above the highest.
    differing: list[list[int]] = (lowest < highest).nonzero().tolist()
    if not differing:
        return
    unit, part = differing[0]
    where = f"rank {placement.rank} on {host_name()} ({placement.coordinates})"
    held = gathered((mine.get((unit, part)), where))
    holders = {rank: found for rank, (found, _) in enumerate(held) if found is not None}
    raise RunFailed(
        f"iteration {run.state.iteration}: {odd_ones(holders, [where for _, where in held])} of "
        f"{units[unit].name}{_more(len({unit for unit, _ in differing}) - 1)}; memory or a collective failed, so the "
        f"replicas no longer train the same model: resume from an earlier checkpoint, without that device."
    )


def _fingerprints(run: Run) -> dict[Part, int]:
    places = {unit.name: place for place, unit in enumerate(run.wrapped.plan.units)}
    return {
        (places[slot.unit], 0 if slot.cut is None else run.placement.tensor_rank): fingerprint(slot.parameter)
        for slot in parameter_slots(run.wrapped.modules)
    }


def odd_ones(holders: Mapping[int, int], where: Sequence[str]) -> str:
    """``rank 1 on node-a (TP 0, PP 0, DP 1) holds other bits than ranks 0, 2``, from rank -> fingerprint and the place
    of every rank of the run. Without a majority all are named."""
    (common, count), *_ = Counter(holders.values()).most_common()
    if 2 * count <= len(holders):
        return f"{' and '.join(where[rank] for rank in holders)} hold different bits"
    odd = [rank for rank, found in holders.items() if found != common]
    others = numbers_in_words([rank for rank in holders if rank not in odd])
    return f"{' and '.join(where[rank] for rank in odd)} hold{'s' * (len(odd) == 1)} other bits than {others}"


def _more(units: int) -> str:
    return f" and {units} more unit{'s' * (units > 1)}" if units else ""


def params_norm(run: Run) -> float:
    """2-norm of every weight of the model, counted once each, the same on all ranks; collective, 8 bytes.

    It uses the fp32 values that the optimizer updates for trainable weights, and frozen weights themselves: nothing has
    to be gathered. Each tensor's norm is taken in fp32, their sum in fp64.
    """
    placement, trained = run.placement, run.wrapped.shards.updated_shards()
    tensors: list[Tensor] = []
    for slot in parameter_slots(run.wrapped.modules):
        if _is_copy(slot) or (slot.cut is None and placement.tensor_rank > 0):
            continue
        if slot.parameter.requires_grad:
            tensors += [trained[slot.parameter]] if slot.parameter in trained else []
        elif placement.data_rank == 0:
            tensors.append(slot.parameter.detach())
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32).double() for tensor in tensors]
    total = torch.zeros((), dtype=torch.float64, device=placement.device)
    if norms:
        total += torch.stack(norms).square().sum()
    dist.all_reduce(total)
    return math.sqrt(float(total))


def _is_copy(slot: ParameterSlot) -> bool:
    """Return whether it is the head of a tied embedding, which the first pipeline stage holds too."""
    return slot.unit == "model.embed_tokens" and slot.local_name.startswith("output_layer")
