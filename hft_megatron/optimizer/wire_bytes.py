"""How many elements megatron-core's gradient buffers hold: the formula behind bytes on the wire. Imports no torch.

Measured on megatron-core 0.16.1 (``_ParamAndGradBuffer``): parameters are laid out in reverse order of registration,
each starts at a multiple of 64 elements, bucket ends are padded to lcm(DP, 128), and a bucket closes once it holds
``bucket_size`` elements. A tied embedding gets a bucket of its own on pipelines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True, kw_only=True)
class TrainedShard:
    """One training parameter of a rank, in the order of registration."""

    elements: int
    own_bucket: bool = False
    """A tied embedding that stands on two pipeline stages."""


def buffer_elements(shards: Sequence[TrainedShard], *, data_parallel_size: int, bucket_size: int | None) -> int:
    """Elements of one model chunk's buffer, padding included.

    Bytes given to reduce-scatter per step are 4 times this (fp32 gradients), bytes of all-gather the parameter's width
    times this. ``bucket_size`` is None without overlapped reduction, on pipeline ranks above 0 and on later chunks.
    """
    divisor = math.lcm(data_parallel_size, BUCKET_ALIGNMENT)
    bucket_start = position = 0
    for shard in reversed(shards):
        position = _round_up(position, PARAMETER_ALIGNMENT)
        if shard.own_bucket and position > bucket_start:
            bucket_start = position = _round_up(position, divisor)
        position += shard.elements
        full = bucket_size is not None and position - bucket_start >= bucket_size
        if full or shard.own_bucket:
            bucket_start = position = _round_up(position, divisor)
    return _round_up(position, divisor)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
