"""Optimizer state of resting units (``--hft-resting-moments host``) as checkpoint tensors, free of any layout."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.carried import keepers
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement


def sharded_resting_state(
    wrapped: WrappedModel, chunks: Mapping[str, Mapping[str, Any]], placement: Placement
) -> dict[str, dict[str, ShardedTensor]]:
    """unit -> name -> description of its state, for the resting units with steps that this rank keeps.

    ``chunks`` are the model's own descriptions (chunk -> parameter -> ShardedTensor), whose cut each state follows.
    Tensors that are not there yet (when loading) are made.
    """
    by_unit = keepers(wrapped.plan, placement.groups.dp)
    found: dict[str, dict[str, ShardedTensor]] = {}
    for chunk, described in zip(wrapped.modules, chunks.values(), strict=True):
        for slot in parameter_slots([chunk]):
            if slot.unit not in wrapped.resting.steps or by_unit[slot.unit] != placement.data_rank:
                continue
            kept = wrapped.resting.tensors.get(slot.unit, {})
            model = described[slot.local_name]
            found[slot.unit] = {
                name: _like(model, name, kept.get(name, torch.empty(slot.parameter.numel())))
                for name in wrapped.shards.state_names
            }
    return found


def _like(model: ShardedTensor, name: str, flat: Tensor) -> ShardedTensor:
    # The keeper alone writes, whatever its data-parallel rank; tensor and pipeline replicas are as the model has them.
    *outer, _ = model.replica_id
    return replace(
        model,
        key=f"resting.{name}.{model.key}",
        data=flat.view(model.local_shape),
        dtype=flat.dtype,
        replica_id=(*outer, 0),
    )


def flattened(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Loaded state in the form that ``CarriedState.tensors`` has: flat tensors in host memory."""
    return {
        unit: {name: tensor.detach().cpu().reshape(-1) for name, tensor in tensors.items()}
        for unit, tensors in state.items()
    }
