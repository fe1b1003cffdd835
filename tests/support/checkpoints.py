"""Checkpoints compared tensor by tensor, whatever the layouts they were saved at."""

from torch import Tensor


def read_whole(folder: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by their names in the model; on a rank of a pool."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(folder)
    return {name: t for name, t in found.items() if isinstance(t, Tensor) and not name.startswith("random_state")}


def largest_differences(one: str, other: str) -> dict[str, float]:
    """Tensor name -> largest difference over the largest value; infinite where a tensor is not in both."""
    here, there = read_whole(one), read_whole(other)
    differences = dict.fromkeys(here.keys() ^ there.keys(), float("inf"))
    for name in here.keys() & there.keys():
        rows = min(len(here[name]), len(there[name]))  # Rows that pad the vocabulary differ with TP.
        a, b = here[name][:rows].double(), there[name][:rows].double()
        differences[name] = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12)
    return differences
