"""Checkpoints by megatron-core's dist_checkpointing: the state of a run that goes into them, and back.

Every data-parallel rank writes or reads a share and holds no more than that in host memory; over tensor and pipeline
ranks the state is sharded like the model.

Tensors go through megatron-core's dist_checkpointing under their names in the whole model: any layout reads them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from hft_megatron.checkpoint.folders import chain_of
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.optimizer.carried import CarriedState, gathered_state, give_state, keepers
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement

Described = Mapping[str, Mapping[str, ShardedTensor]]
"""Chunk -> local name -> description of the parameter; its state is sharded in the same way."""
State = dict[str, dict[str, ShardedTensor]]
"""unit -> name -> description of its state, for the units that this rank keeps."""
_TRAINING, _FROZEN = "optimizer.state", "resting"
"""Prefixes of state in a checkpoint, of trainable units and of frozen ones, where files keep their earlier name."""


def sharded_training_state(wrapped: WrappedModel, described: Described, placement: Placement) -> State:
    """State of the trainable units, for writing; collective, one tensor at a time passes through device memory."""
    group, by_unit = placement.groups.dp, keepers(wrapped.training_slots, placement.groups.dp)
    found: State = {}
    for slot, model in described_slots(wrapped, described):
        *outer, _ = model.replica_id
        # A unit that another tensor or pipeline rank holds as well is written there.
        if slot.unit in by_unit and not any(outer):
            state = gathered_state(wrapped.shards, slot.parameter, by_unit[slot.unit], group)
            kept = {name: like_weight(model, f"{_TRAINING}.{name}", whole.cpu()) for name, whole in state}
            if kept:
                found[slot.unit] = kept
    return found


def empty_training_state(wrapped: WrappedModel, described: Described, placement: Placement) -> State:
    """State of the trainable units, for reading: tensors to fill."""
    by_unit = keepers(wrapped.training_slots, placement.groups.dp)
    return {
        slot.unit: {
            name: like_weight(model, f"{_TRAINING}.{name}", torch.empty(slot.parameter.numel()))
            for name in wrapped.shards.state_names
        }
        for slot, model in described_slots(wrapped, described)
        if by_unit.get(slot.unit) == placement.data_rank
    }


def set_training_state(
    wrapped: WrappedModel, loaded: Mapping[str, Mapping[str, Tensor]], steps: Mapping[str, int], placement: Placement
) -> None:
    """Sets the state that ``empty_training_state`` described and dist_checkpointing filled; collective like the saving.

    ``steps`` are the updates in units' moments, where there are any.
    """
    counts = {unit: steps.get(unit, 0) for unit in wrapped.plan.training}
    carried = CarriedState(steps=counts, tensors=flattened(loaded))
    give_state(wrapped.shards, wrapped.training_slots, carried, placement.groups.dp)


def set_masters_from_weights(wrapped: WrappedModel) -> None:
    """Sets the fp32 masters of trainable units to the model's current weights; an fp32 weight is its own master."""
    if "param" not in wrapped.shards.state_names:
        return
    for slot in wrapped.training_slots:
        wrapped.shards.set_shard(slot.parameter, {"param": slot.parameter.detach().float().view(-1)})


def sharded_frozen_state(wrapped: WrappedModel, described: Described, placement: Placement) -> State:
    """State of frozen units that have steps (``--hft-frozen-moments host``); missing tensors are created."""
    by_unit = keepers(list(parameter_slots(wrapped.modules)), placement.groups.dp)
    found: State = {}
    for slot, model in described_slots(wrapped, described):
        if slot.unit in wrapped.frozen.steps and by_unit[slot.unit] == placement.data_rank:
            kept = wrapped.frozen.tensors.get(slot.unit, {})
            found[slot.unit] = {
                name: like_weight(model, f"{_FROZEN}.{name}", kept.get(name, torch.empty(slot.parameter.numel())))
                for name in wrapped.shards.state_names
            }
    return found


def flattened(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Loaded state in the form of ``CarriedState.tensors``: flat tensors in host memory."""
    return {
        unit: {name: tensor.detach().cpu().reshape(-1) for name, tensor in tensors.items()}
        for unit, tensors in state.items()
    }


def described_slots(wrapped: WrappedModel, described: Described) -> Iterator[tuple[ParameterSlot, ShardedTensor]]:
    """This rank's parameters with their descriptions, in one order on all data-parallel ranks."""
    for chunk, tensors in zip(wrapped.modules, described.values(), strict=True):
        for slot in parameter_slots([chunk]):
            yield slot, tensors[slot.local_name]


def like_weight(model: ShardedTensor, prefix: str, flat: Tensor) -> ShardedTensor:
    """A flat tensor of a parameter's size, described for dist_checkpointing: named ``PREFIX.`` and the weight's name,
    sharded over tensor and pipeline ranks like the weight."""
    # The keeper alone writes, whatever its data-parallel rank; tensor and pipeline replicas are as the model has them.
    *outer, _ = model.replica_id
    return replace(
        model,
        key=f"{prefix}.{model.key}",
        data=flat.view(model.local_shape),
        dtype=flat.dtype,
        replica_id=(*outer, 0),
    )


def random_state() -> dict[str, torch.Tensor]:
    """This rank's generators by name; each a uint8 vector."""
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    tracker = get_cuda_rng_tracker().get_states()
    return states | {f"tracker.{name}": state for name, state in tracker.items()}


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(states["cpu"].cpu())
    torch.cuda.set_rng_state(states["device"].cpu())
    get_cuda_rng_tracker().set_states(
        {name.removeprefix("tracker."): state.cpu() for name, state in states.items() if name.startswith("tracker.")}
    )


def sharded_random_state(placement: Placement) -> dict[str, ShardedTensor]:
    """``random_state`` for dist_checkpointing. It fits only the same tensor and pipeline sizes."""
    row = placement.pipeline_rank * placement.tensor_size + placement.tensor_rank
    rows = placement.pipeline_size * placement.tensor_size
    return {
        name: ShardedTensor.from_rank_offsets(
            f"random_state.{name}",
            state.unsqueeze(0),
            (0, row, rows),
            replica_id=placement.data_rank,
        )
        for name, state in random_state().items()
    }


PLAN_FILE = "plan.json"
_EXTRA_STATE = "_extra_state"

METADATA = {
    # Plans differ from layer to layer: layers stacked into one global tensor would have holes, and the save would die.
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}
"""Options with which megatron-core describes the weights and records the layout; the same at save and load."""


def sharded_state(
    wrapped: WrappedModel, placement: Placement, *, left_out: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Contents of a checkpoint, except the weights of the units in ``left_out``; collective."""
    described = described_weights(wrapped.modules)
    state: dict[str, Any] = {
        "optimizer": sharded_training_state(wrapped, described, placement),
        _FROZEN: sharded_frozen_state(wrapped, described, placement),
        "random_state": sharded_random_state(placement),
    }
    by_unit = keepers(list(parameter_slots(wrapped.modules)), placement.groups.dp)
    for (name, tensors), chunk in zip(described.items(), wrapped.modules, strict=True):
        written = {slot.local_name: slot.unit for slot in parameter_slots([chunk]) if slot.unit not in left_out}
        state[name] = {local: _written_by(by_unit[unit], tensors[local], placement) for local, unit in written.items()}
    return state


def _written_by(keeper: int, tensor: ShardedTensor, placement: Placement) -> ShardedTensor:
    """Assigns a weight that all data-parallel ranks hold to one writer; in megatron-core the first would write all."""
    *outer, _ = tensor.replica_id
    return replace(tensor, replica_id=(*outer, (placement.data_rank - keeper) % placement.data_size))


def check_saved_plan(path: Path, plan: Plan, shape: ModelShape) -> None:
    """Raises UserError unless the checkpoint was trained with ``plan``: its moments belong to those units alone."""
    file = path / PLAN_FILE
    saved = Plan.from_json(file.read_text(encoding="utf-8"), shape=shape, source=str(file))
    difference = saved.first_difference(plan)
    if difference is not None:
        raise UserError(
            f"--load {path.parent}: the checkpoint's plan {saved.short_digest} and this command's plan "
            f"{plan.short_digest} differ first in {difference}; resume with the options and version that saved it."
        )


def load_checkpoint(path: Path, wrapped: WrappedModel, placement: Placement, *, optimizer: bool = True) -> TrainState:
    """Fills model, optimizer and random states from ``path``; every rank must call it.

    Without ``optimizer`` its state starts afresh: moments at zero, and masters from the loaded weights. Where the chain
    of bases ends in a Hugging Face folder, its weights must be in the model already.
    """
    state = TrainState.read(path)
    same_layout = (state.tensor_model_parallel_size, state.pipeline_model_parallel_size, state.device) == (
        placement.tensor_size,
        placement.pipeline_size,
        placement.device.type,
    )
    load_weights(path, wrapped.modules)
    description: dict[str, Any] = {}
    if optimizer:
        training, described = wrapped.plan.training, described_weights(wrapped.modules)
        wrapped.frozen.steps = {unit: n for unit, n in state.unit_steps.items() if unit not in training}
        description["optimizer"] = empty_training_state(wrapped, described, placement)
        description[_FROZEN] = sharded_frozen_state(wrapped, described, placement)
    if same_layout:
        # Random states belong to ranks and to a kind of device. Nothing in this model draws after the start but
        # the dropout of adapters, which is seeded in every step, so others change nothing.
        description["random_state"] = sharded_random_state(placement)
    loaded: dict[str, Any] = dist_checkpointing.load(description, str(path)) if description else {}
    if optimizer:
        # Absent on a rank that keeps nothing: dist_checkpointing drops empty dictionaries.
        set_training_state(wrapped, loaded.get("optimizer", {}), state.unit_steps, placement)
        wrapped.frozen.tensors = flattened(loaded.get(_FROZEN, {}))
    else:
        set_masters_from_weights(wrapped)
    if same_layout:
        set_random_state({name: row.squeeze(0) for name, row in loaded["random_state"].items()})
    return state


def load_moments(path: Path, wrapped: WrappedModel, placement: Placement, *, keeps_frozen: bool) -> int:
    """Gives ``wrapped``, which already has the weights of ``path``, the moments that a switch of rounds would carry
    over from there; every rank must call it. Returns the number of units with moments.

    They are those of units that train now and, with ``keeps_frozen``, of others. The checkpoint is of a run in the same
    data type.
    """
    steps, names = TrainState.read(path).unit_steps, wrapped.shards.state_names
    units = {unit: count for unit, count in steps.items() if keeps_frozen or unit in wrapped.plan.training}
    if not units:
        return 0
    held = dist_checkpointing.load_tensors_metadata(str(path)).keys()
    of_state = [key.removeprefix(f"{_TRAINING}.") for key in held if key.startswith(f"{_TRAINING}.")]
    saved = {key.partition(".")[0] for key in of_state}
    assert saved == set(names), f"{path} holds {sorted(saved)}"
    slots, described = list(parameter_slots(wrapped.modules)), described_weights(wrapped.modules)
    by_unit = keepers(slots, placement.groups.dp)
    wanted: State = {}
    for slot, model in described_slots(wrapped, described):
        if slot.unit in units and by_unit[slot.unit] == placement.data_rank:
            prefix = _TRAINING if f"{_TRAINING}.{names[0]}.{model.key}" in held else _FROZEN
            # Rows that pad the vocabulary may be fewer in the file.
            wanted[slot.unit] = {
                name: like_weight(model, f"{prefix}.{name}", torch.zeros(slot.parameter.numel())) for name in names
            }
    # Also on a rank that keeps nothing: all ranks of the run read together.
    loaded = dist_checkpointing.load({"moments": wanted}, str(path)).get("moments", {})
    carried = CarriedState(steps=dict(units), tensors=flattened(loaded))
    give_state(wrapped.shards, slots, carried, placement.groups.dp)
    wrapped.frozen.steps, wrapped.frozen.tensors = carried.steps, carried.tensors
    return len(units)


def load_weights(path: Path, chunks: Sequence[LlamaModel]) -> None:
    """Fills the model from ``path`` and its bases, the last of the chain first; every rank must call it. The weights of
    a Hugging Face folder at its end must be in the model already."""
    for at, state in reversed(list(chain_of(path))):
        _load_held_weights(at, state, chunks)


def _load_held_weights(path: Path, state: TrainState, chunks: Sequence[LlamaModel]) -> None:
    """Fills the weights that one checkpoint holds, and leaves the rest unchanged."""
    held = dist_checkpointing.load_tensors_metadata(str(path)).keys()
    wanted = {
        name: {local: tensor for local, tensor in tensors.items() if tensor.key in held}
        for name, tensors in described_weights(chunks).items()
    }
    loaded = dist_checkpointing.load(wanted, str(path))
    for chunk, (name, tensors) in zip(chunks, wanted.items(), strict=True):
        answer = chunk.load_state_dict(loaded.get(name, {}), strict=False)
        assert not answer.unexpected_keys
        missing = [key for key in answer.missing_keys if not key.endswith(_EXTRA_STATE)]
        assert not state.is_whole or not missing, f"{path} lacks {missing}"
        assert loaded.get(name, {}).keys() == tensors.keys()


def described_weights(chunks: Sequence[LlamaModel]) -> Described:
    """Descriptions of the weights alone. The ``_extra_state`` of transformer-engine's modules is about FP8, which is
    not used: so a checkpoint doesn't depend on the implementation of norms, and holds no pickles."""
    states = {f"model{index}": chunk.sharded_state_dict(metadata=dict(METADATA)) for index, chunk in enumerate(chunks)}
    return {
        name: {local: entry for local, entry in state.items() if not local.endswith(_EXTRA_STATE)}
        for name, state in states.items()
    }
