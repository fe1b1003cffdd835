"""Optimizer state outside the optimizer, whole per parameter, so that no bucket layout matters.

From one round to the next: under ``--hft-moments carry`` AdamW's moments (and, for bf16, the fp32 master) of a unit
outlive the buffers of a round: always for units that continue to train, and for units that become frozen under
``--hft-frozen-moments host``. Also on the way into checkpoints and back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.model.parameters import ParameterSlot
from hft_megatron.optimizer.distributed import HFTDistributedOptimizer


@dataclass(kw_only=True)
class CarriedState:
    """State of units that no optimizer holds at the moment."""

    steps: dict[str, int] = field(default_factory=dict)
    """Updates that each unit's moments have seen; the same on every rank, whoever holds the unit."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """unit -> name -> (elements,) fp32 of the units that this data-parallel rank keeps, the part of its tensor-parallel
    rank: in host memory, or in a switch of rounds on the device if the unit continues to train. Names are those of the
    optimizer's state: ``exp_avg``, ``exp_avg_sq`` and, for bf16, ``param``."""

    @property
    def bytes(self) -> int:
        """Memory of the tensors that this rank keeps."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def take_state(
    optimizer: HFTDistributedOptimizer,
    slots: Sequence[ParameterSlot],
    units: frozenset[str],
    group: dist.ProcessGroup,
    *,
    continuing: frozenset[str],
) -> CarriedState:
    """Moves the state of the training ``units`` out of the optimizer, which cannot step after that.

    Collective over the data-parallel ``group``, of which each rank keeps about an equal share; ``slots`` are all of
    this rank's parameters. State of the ``continuing`` units stays on the device, other state goes to host memory.
    """
    carried = CarriedState(steps={unit: steps for unit in units if (steps := optimizer.steps_of(unit)) > 0})
    by_unit = keepers(slots, group)
    for slot in slots:
        if slot.unit not in carried.steps:
            continue
        for name, whole in gathered_state(optimizer, slot.parameter, by_unit[slot.unit], group):
            kept = whole if slot.unit in continuing else in_host_memory(whole)
            carried.tensors.setdefault(slot.unit, {})[name] = kept
        optimizer.drop_shard(slot.parameter)
    return carried


def give_state(
    optimizer: HFTDistributedOptimizer, slots: Sequence[ParameterSlot], carried: CarriedState, group: dist.ProcessGroup
) -> None:
    """Moves the state of units that train now from ``carried`` into a fresh optimizer; collective like ``take_state``.

    One parameter at a time passes through device memory. ``slots`` are those that ``keepers`` had. The state that is
    left in ``carried`` belongs to frozen units.
    """
    units = frozenset(carried.steps) & optimizer.plan.training
    optimizer.begin({unit: carried.steps.pop(unit) for unit in units})
    by_unit = keepers(slots, group)
    for slot in slots:
        if slot.unit not in units:
            continue
        kept = carried.tensors.pop(slot.unit, None)
        wholes = {
            name: spread(None if kept is None else kept[name], slot.parameter, by_unit[slot.unit], group)
            for name in optimizer.state_names
        }
        optimizer.set_shard(slot.parameter, wholes)


def keepers(slots: Sequence[ParameterSlot], group: dist.ProcessGroup) -> dict[str, int]:
    """unit -> rank of the data-parallel ``group`` that keeps its state outside an optimizer, for this rank's ``slots``.

    The largest first, each to the rank with the least so far: all keep about as much.
    """
    found, kept = {}, [0] * group.size()
    for slot in sorted(slots, key=lambda slot: slot.parameter.numel(), reverse=True):
        found[slot.unit] = kept.index(min(kept))
        kept[found[slot.unit]] += slot.parameter.numel()
    return found


def spread(kept: Tensor | None, parameter: Parameter, keeper: int, group: dist.ProcessGroup) -> Tensor:
    """A parameter's state that its keeper has ``kept``, (elements,) fp32, on every rank's device; collective over the
    data-parallel ``group``."""
    if kept is None:
        whole = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
    else:
        whole = kept.to(parameter.device)
    dist.broadcast(whole, src=dist.get_global_rank(group, keeper), group=group)
    return whole


def gathered_state(
    optimizer: HFTDistributedOptimizer, parameter: Parameter, keeper: int, group: dist.ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and whole state (elements,) of a training parameter on its keeper, on the device; elsewhere nothing.

    Collective over the data-parallel ``group``, one tensor at a time. On a group of one they are the optimizer's own.
    """
    held, shard = optimizer.range_of(parameter), optimizer.shard_of(parameter)
    for name in optimizer.state_names:
        whole = gathered_whole(None if shard is None else shard[1][name], held, parameter, keeper, group)
        if whole is not None:
            yield name, whole
        del whole  # or it would live while the next one is made


def gathered_whole(
    shard: Tensor | None, held: slice | None, parameter: Parameter, keeper: int, group: dist.ProcessGroup
) -> Tensor | None:
    """The whole (elements,) fp32 tensor of which this rank has a ``shard``, the elements ``held``: on the keeper, None
    elsewhere. Collective over the data-parallel ``group``. On a group of one it is the shard itself."""
    if group.size() == 1:
        assert shard is not None
        return shard
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if shard is not None:
        whole[held] = shard
    dist.reduce(whole, dst=dist.get_global_rank(group, keeper), group=group)
    return whole if group.rank() == keeper else None


def whole_masters(
    optimizer: HFTDistributedOptimizer, slots: Sequence[ParameterSlot], group: dist.ProcessGroup
) -> dict[Parameter, Tensor]:
    """The fp32 masters of the trainable ``slots`` in the shapes of their parameters, on the first rank of the
    data-parallel ``group``; nothing on others, and where parameters are their own masters. Collective."""
    found: dict[Parameter, Tensor] = {}
    if "param" not in optimizer.state_names:
        return found
    shards = optimizer.updated_shards()
    for slot in slots:
        parameter = slot.parameter
        whole = gathered_whole(shards.get(parameter), optimizer.range_of(parameter), parameter, 0, group)
        if whole is not None:
            found[parameter] = whole.view_as(parameter)
    return found


def in_host_memory(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where there is a GPU, since it will return to the device."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return copy.copy_(tensor)
