"""Optimizer state of units on its way from one round to the next, whole per unit, so that no bucket layout matters.

Under ``--hft-moments carry`` AdamW's moments (and, for bf16, the fp32 master) of a unit outlive the buffers of a round:
those of units that go on training always, those of units that rest only where ``--hft-resting-moments host`` asks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.hft.plan import Plan
from hft_megatron.model.parameters import ParameterSlot
from hft_megatron.optimizer.distributed import HFTDistributedOptimizer


@dataclass(kw_only=True)
class CarriedState:
    """State of units that no optimizer holds at the moment."""

    steps: dict[str, int] = field(default_factory=dict)
    """Updates that each unit's moments have seen; the same on every rank, whoever holds the unit."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """unit -> name -> (elements,) fp32 in host memory: of the units that this data-parallel rank keeps, the part of its
    tensor-parallel rank. Names are those of the optimizer's state: ``exp_avg``, ``exp_avg_sq`` and, for bf16,
    ``param``."""

    @property
    def bytes(self) -> int:
        """Host memory of what this rank keeps."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def take_state(
    optimizer: HFTDistributedOptimizer, slots: Sequence[ParameterSlot], units: frozenset[str], group: dist.ProcessGroup
) -> CarriedState:
    """Moves the state of the training ``units`` out of the optimizer, which cannot step after that.

    Collective over the data-parallel ``group``, of which each rank keeps about its share; ``slots`` are all of this
    rank's parameters. One parameter at a time passes through device memory.
    """
    carried = CarriedState(steps={unit: steps for unit in units if (steps := optimizer.steps_of(unit)) > 0})
    for slot, keeper in _with_keepers(optimizer.plan, slots, frozenset(carried.steps), group):
        shard = optimizer.take_shard(slot.parameter)
        for name in optimizer.state_names:
            whole = torch.zeros(slot.parameter.numel(), dtype=torch.float32, device=slot.parameter.device)
            if shard is not None:
                start, tensors = shard
                whole[start : start + tensors[name].numel()] = tensors[name]
            dist.reduce(whole, dst=dist.get_global_rank(group, keeper), group=group)
            if group.rank() == keeper:
                carried.tensors.setdefault(slot.unit, {})[name] = whole.cpu()
    return carried


def give_state(
    optimizer: HFTDistributedOptimizer, slots: Sequence[ParameterSlot], carried: CarriedState, group: dist.ProcessGroup
) -> None:
    """Moves the state of units that train now from ``carried`` into a fresh optimizer; collective like ``take_state``.

    What is left in ``carried`` belongs to resting units.
    """
    units = frozenset(carried.steps) & optimizer.plan.training
    optimizer.start_steps = {unit: carried.steps.pop(unit) for unit in units}
    for slot, keeper in _with_keepers(optimizer.plan, slots, units, group):
        kept = carried.tensors.pop(slot.unit, None)
        wholes = {}
        for name in optimizer.state_names:
            if kept is None:
                whole = torch.empty(slot.parameter.numel(), dtype=torch.float32, device=slot.parameter.device)
            else:
                whole = kept[name].to(slot.parameter.device)
            dist.broadcast(whole, src=dist.get_global_rank(group, keeper), group=group)
            wholes[name] = whole
        optimizer.set_shard(slot.parameter, wholes)


def keepers(plan: Plan, group: dist.ProcessGroup) -> dict[str, int]:
    """unit -> rank of the data-parallel ``group`` that keeps its state while no optimizer does; units take turns."""
    return {unit.name: position % group.size() for position, unit in enumerate(plan.units)}


def _with_keepers(
    plan: Plan, slots: Sequence[ParameterSlot], units: frozenset[str], group: dist.ProcessGroup
) -> Iterator[tuple[ParameterSlot, int]]:
    """This rank's parameters of ``units``, in one order on all data-parallel ranks, each with its keeper."""
    by_unit = keepers(plan, group)
    for slot in slots:
        if slot.unit in units:
            yield slot, by_unit[slot.unit]
