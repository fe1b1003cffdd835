"""What a checkpoint holds: the sharded state of a run, and the way back into a model and its optimizer.

Tensors go through megatron-core's dist_checkpointing under their names in the whole model: any layout reads them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from hft_megatron.checkpoint.folders import ITERATION_FOLDER
from hft_megatron.checkpoint.optimizer_state import (
    Described,
    empty_training_state,
    flattened,
    set_training_state,
    sharded_resting_state,
    sharded_training_state,
)
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.random_state import set_random_state, sharded_random_state
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.carried import keepers
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement

PLAN_FILE = "plan.json"
_EXTRA_STATE = "_extra_state"

METADATA = {
    # Plans differ from layer to layer: layers stacked into one global tensor would have holes, and the save would die.
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}
"""How megatron-core describes the weights, and what it records of the layout; the same at save and load."""


def sharded_state(
    wrapped: WrappedModel, placement: Placement, *, left_out: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Everything that a checkpoint holds, except the weights of the units in ``left_out``; collective."""
    described = _described(wrapped.modules)
    state: dict[str, Any] = {
        "optimizer": sharded_training_state(wrapped, described, placement),
        "resting": sharded_resting_state(wrapped, described, placement),
        "random_state": sharded_random_state(placement),
    }
    by_unit = keepers(list(parameter_slots(wrapped.modules)), placement.groups.dp)
    for (name, tensors), chunk in zip(described.items(), wrapped.modules, strict=True):
        written = {slot.local_name: slot.unit for slot in parameter_slots([chunk]) if slot.unit not in left_out}
        state[name] = {local: _written_by(by_unit[unit], tensors[local], placement) for local, unit in written.items()}
    return state


def _written_by(keeper: int, tensor: ShardedTensor, placement: Placement) -> ShardedTensor:
    """Has one data-parallel rank write a weight that all hold; by megatron-core the first one would write them all."""
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
            f"{plan.short_digest} differ first in {difference}; go on with the options and version it was saved with."
        )


def load_checkpoint(path: Path, wrapped: WrappedModel, placement: Placement) -> TrainState:
    """Fills model, optimizer and random states from ``path``; every rank must call it.

    Of a checkpoint without all weights whose base is a Hugging Face folder, that folder must be in the model already.
    """
    state = TrainState.read(path)
    same_layout = (state.tensor_model_parallel_size, state.pipeline_model_parallel_size, state.device) == (
        placement.tensor_size,
        placement.pipeline_size,
        placement.device.type,
    )
    load_weights(path, wrapped.modules)
    training, described = wrapped.plan.training, _described(wrapped.modules)
    wrapped.resting.steps = {unit: n for unit, n in state.unit_steps.items() if unit not in training}
    description: dict[str, Any] = {
        "optimizer": empty_training_state(wrapped, described, placement),
        "resting": sharded_resting_state(wrapped, described, placement),
    }
    if same_layout:
        # Random states belong to ranks and to a kind of device. Nothing in this model draws after the start, so new
        # ones change nothing.
        description["random_state"] = sharded_random_state(placement)
    loaded: dict[str, Any] = dist_checkpointing.load(description, str(path))
    # Absent on a rank that keeps nothing: dist_checkpointing drops empty dictionaries.
    set_training_state(wrapped, loaded.get("optimizer", {}), state.unit_steps, placement)
    wrapped.resting.tensors = flattened(loaded.get("resting", {}))
    if same_layout:
        set_random_state({name: row.squeeze(0) for name, row in loaded["random_state"].items()})
    return state


def load_weights(path: Path, chunks: Sequence[LlamaModel]) -> None:
    """Fills the model from ``path`` and the checkpoint it is based on, if any; every rank must call it."""
    state = TrainState.read(path)
    if state.base_iteration is not None:
        load_weights(path.with_name(ITERATION_FOLDER.format(state.base_iteration)), chunks)
    held = dist_checkpointing.load_tensors_metadata(str(path)).keys()
    wanted = {
        name: {local: tensor for local, tensor in tensors.items() if tensor.key in held}
        for name, tensors in _described(chunks).items()
    }
    loaded = dist_checkpointing.load(wanted, str(path))
    for chunk, (name, tensors) in zip(chunks, wanted.items(), strict=True):
        answer = chunk.load_state_dict(loaded.get(name, {}), strict=False)
        assert not answer.unexpected_keys
        missing = [key for key in answer.missing_keys if not key.endswith(_EXTRA_STATE)]
        assert not state.is_whole or not missing, f"{path} lacks {missing}"
        assert loaded.get(name, {}).keys() == tensors.keys()


def _described(chunks: Sequence[LlamaModel]) -> Described:
    """The weights alone. What transformer-engine's modules have beside them (``_extra_state``) is about FP8, which is
    not in use: a checkpoint is the same whoever's norms the model has, and holds no pickles."""
    states = {f"model{index}": chunk.sharded_state_dict(metadata=dict(METADATA)) for index, chunk in enumerate(chunks)}
    return {
        name: {local: entry for local, entry in state.items() if not local.endswith(_EXTRA_STATE)}
        for name, state in states.items()
    }
