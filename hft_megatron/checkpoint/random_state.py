"""Random states as checkpoint tensors: one row per tensor and pipeline rank, so that they need no pickle."""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from hft_megatron.parallel.groups import Placement


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
