"""Times an all-reduce, and checks its sum."""

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

ELEMENTS = 1 << 22
"""fp32: 16.8 MB, about one bucket of gradients."""
_WARM_UPS = 2
"""The first one connects the ranks."""
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class AllReduceSpeed:
    """What one rank measured."""

    message_bytes: int
    seconds: float
    """Median of several."""
    is_right: bool


def measure_all_reduce(group: dist.ProcessGroup, device: torch.device, *, elements: int = ELEMENTS) -> AllReduceSpeed:
    """All-reduces ``elements`` fp32 numbers on every rank of ``group`` a few times; collective over it.

    Each rank adds its place in the group plus 1, so that every entry of the sum over n ranks is n (n + 1) / 2.
    """
    size, place = dist.get_world_size(group), dist.get_rank(group) + 1
    tensor = torch.empty(elements, dtype=torch.float32, device=device)
    took, is_right = [], True
    for _ in range(_WARM_UPS + _REPEATS):
        tensor.fill_(place)
        torch.cuda.synchronize()
        dist.barrier(group)
        begun = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
        is_right = is_right and bool((tensor == size * (size + 1) / 2).all())
    return AllReduceSpeed(
        message_bytes=tensor.numel() * tensor.element_size(), seconds=median(took[_WARM_UPS:]), is_right=is_right
    )
