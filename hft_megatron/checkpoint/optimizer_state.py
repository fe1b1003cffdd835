"""Optimizer state as checkpoint tensors, free of any layout: each parameter's is written and read by one rank.

Of the data-parallel ranks, that is; the state is cut over tensor and pipeline ranks as the model is. Every rank holds
its share in host memory while it writes or reads, and no more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.optimizer.carried import CarriedState, gathered_state, give_state, keepers
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement

Described = Mapping[str, Mapping[str, ShardedTensor]]
"""Chunk -> local name -> description of the parameter, whose cut its state follows."""
State = dict[str, dict[str, ShardedTensor]]
"""unit -> name -> description of its state, for the units that this rank keeps."""


def sharded_training_state(wrapped: WrappedModel, described: Described, placement: Placement) -> State:
    """The state of what trains, to be written; collective, one tensor at a time passes through device memory."""
    group, by_unit = placement.groups.dp, keepers(_training_slots(wrapped), placement.groups.dp)
    found: State = {}
    for slot, model in _slots(wrapped, described):
        *outer, _ = model.replica_id
        # What another tensor or pipeline rank holds as well is written there.
        if slot.unit in by_unit and not any(outer):
            state = gathered_state(wrapped.shards, slot.parameter, by_unit[slot.unit], group)
            kept = {name: _like(model, f"optimizer.state.{name}", whole.cpu()) for name, whole in state}
            if kept:
                found[slot.unit] = kept
    return found


def empty_training_state(wrapped: WrappedModel, described: Described, placement: Placement) -> State:
    """The same to be read: tensors to fill."""
    by_unit = keepers(_training_slots(wrapped), placement.groups.dp)
    return {
        slot.unit: {
            name: _like(model, f"optimizer.state.{name}", torch.empty(slot.parameter.numel()))
            for name in wrapped.shards.state_names
        }
        for slot, model in _slots(wrapped, described)
        if by_unit.get(slot.unit) == placement.data_rank
    }


def set_training_state(
    wrapped: WrappedModel, loaded: Mapping[str, Mapping[str, Tensor]], steps: Mapping[str, int], placement: Placement
) -> None:
    """Takes what ``empty_training_state`` described and dist_checkpointing filled; collective like the saving.

    ``steps`` are the updates that units' moments have seen, where there are any.
    """
    counts = {unit: steps.get(unit, 0) for unit in wrapped.plan.training}
    carried = CarriedState(steps=counts, tensors=flattened(loaded))
    give_state(wrapped.shards, _training_slots(wrapped), carried, placement.groups.dp)


def sharded_resting_state(wrapped: WrappedModel, described: Described, placement: Placement) -> State:
    """The state of what rests and has steps (``--hft-resting-moments host``); tensors that are not there are made."""
    by_unit = keepers(list(parameter_slots(wrapped.modules)), placement.groups.dp)
    found: State = {}
    for slot, model in _slots(wrapped, described):
        if slot.unit in wrapped.resting.steps and by_unit[slot.unit] == placement.data_rank:
            kept = wrapped.resting.tensors.get(slot.unit, {})
            found[slot.unit] = {
                name: _like(model, f"resting.{name}", kept.get(name, torch.empty(slot.parameter.numel())))
                for name in wrapped.shards.state_names
            }
    return found


def flattened(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Loaded state in the form that ``CarriedState.tensors`` has: flat tensors in host memory."""
    return {
        unit: {name: tensor.detach().cpu().reshape(-1) for name, tensor in tensors.items()}
        for unit, tensors in state.items()
    }


def _training_slots(wrapped: WrappedModel) -> list[ParameterSlot]:
    return [slot for slot in parameter_slots(wrapped.modules) if wrapped.plan.trains(slot.unit)]


def _slots(wrapped: WrappedModel, described: Described) -> Iterator[tuple[ParameterSlot, ShardedTensor]]:
    """This rank's parameters with their descriptions, in one order on all data-parallel ranks."""
    for chunk, tensors in zip(wrapped.modules, described.values(), strict=True):
        for slot in parameter_slots([chunk]):
            yield slot, tensors[slot.local_name]


def _like(model: ShardedTensor, prefix: str, flat: Tensor) -> ShardedTensor:
    # The keeper alone writes, whatever its data-parallel rank; tensor and pipeline replicas are as the model has them.
    *outer, _ = model.replica_id
    return replace(
        model,
        key=f"{prefix}.{model.key}",
        data=flat.view(model.local_shape),
        dtype=flat.dtype,
        replica_id=(*outer, 0),
    )
