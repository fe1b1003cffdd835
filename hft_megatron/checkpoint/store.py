"""Writes and reads ``SAVE/iter_0000100/`` through megatron-core's dist_checkpointing; the tracker comes last."""

import queue
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from hft_megatron.checkpoint.position import ITERATION_FOLDER, TrainState
from hft_megatron.checkpoint.random_state import set_random_state, sharded_random_state
from hft_megatron.checkpoint.resting_state import flattened, sharded_resting_state
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, write_atomically
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement

PLAN_FILE = "plan.json"
UNFINISHED_SUFFIX = ".unfinished"

_METADATA = {
    # Plans differ from layer to layer: layers stacked into one global tensor would have holes, and the save would die.
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}


def save_checkpoint(folder: str, wrapped: WrappedModel, state: TrainState, placement: Placement) -> Path:
    """Saves model, optimizer, plan, position and random states; every rank must call it. Returns the new folder.

    Written under a temporary name and renamed when complete, then the tracker is replaced atomically: a run killed at
    any moment resumes from the newest complete checkpoint.
    """
    path = Path(folder) / ITERATION_FOLDER.format(state.iteration)
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    if placement.rank == 0:
        # A run killed while saving left it, or (the last one) this iteration was saved already and nothing changed.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    _write_without_manager()
    with wrapped.gathered_parameters():
        dist_checkpointing.save(_sharded_state(wrapped, placement, is_loading=False), str(unfinished))
    if placement.rank == 0:
        replace(state, unit_steps=wrapped.unit_steps).write(unfinished)
        (unfinished / PLAN_FILE).write_text(wrapped.plan.to_json(), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        write_atomically(Path(folder) / CHECKPOINT_TRACKER_FILE, f"{state.iteration}\n")
    dist.barrier()
    return path


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
    """Fills model, optimizer and random states from ``path``; every rank must call it."""
    state = TrainState.read(path)
    same_layout = (state.tensor_model_parallel_size, state.pipeline_model_parallel_size, state.device) == (
        placement.tensor_size,
        placement.pipeline_size,
        placement.device.type,
    )
    training = wrapped.plan.training
    wrapped.shards.start_steps = {unit: n for unit, n in state.unit_steps.items() if unit in training}
    wrapped.resting.steps = {unit: n for unit, n in state.unit_steps.items() if unit not in training}
    description = _sharded_state(wrapped, placement, is_loading=True)
    if not same_layout:
        # Random states belong to ranks and to a kind of device. Nothing in this model draws after the start, so new
        # ones change nothing.
        del description["random_state"]
    loaded: dict[str, Any] = dist_checkpointing.load(description, str(path))
    for name, chunk in _named_chunks(wrapped):
        chunk.load_state_dict(loaded[name], strict=True)
    # Absent on a rank that owns nothing to train: dist_checkpointing drops empty dictionaries.
    wrapped.optimizer.load_state_dict(loaded.get("optimizer", {}))
    wrapped.resting.tensors = flattened(loaded.get("resting", {}))
    if same_layout:
        set_random_state({name: row.squeeze(0) for name, row in loaded["random_state"].items()})
    return state


def _write_without_manager() -> None:
    """Has writers report through a queue of this process, which is all that saving synchronously needs.

    By default megatron-core keeps a manager process for it. torchrun sends a signal to a rank's whole process group: it
    would kill the manager, and with it the checkpoint that the signal asks for.
    """
    filesystem_async._results_queue = queue.Queue()


def _named_chunks(wrapped: WrappedModel) -> list[tuple[str, Any]]:
    return [(f"model{index}", chunk) for index, chunk in enumerate(wrapped.modules)]


def _sharded_state(wrapped: WrappedModel, placement: Placement, *, is_loading: bool) -> dict[str, Any]:
    chunks = {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in _named_chunks(wrapped)}
    optimizer = wrapped.optimizer.sharded_state_dict(chunks, is_loading, metadata=dict(_METADATA))
    return {
        **chunks,
        "optimizer": optimizer,
        "resting": sharded_resting_state(wrapped, chunks, placement),
        "random_state": sharded_random_state(placement),
    }
