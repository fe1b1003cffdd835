"""Where training parameters lie in megatron-core's gradient buffers: the formula behind bytes on the wire and bytes of
optimizer state. Imports no torch.

Measured on megatron-core 0.16.1 (``_ParamAndGradBuffer``): parameters are laid out in reverse order of registration,
each starts at a multiple of 64 elements, bucket ends are padded to lcm(DP, 128), and a bucket closes once it holds
``bucket_size`` elements. A tied embedding gets a bucket of its own on pipelines. Every data-parallel rank owns an equal
part of every bucket (``DistributedOptimizer``), padding included, without regard to where parameters begin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
DEFAULT_BUCKET_SIZE = 40_000_000
DEFAULT_BUCKET_SIZE_PER_RANK = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TrainedShard:
    """One training parameter of a rank, in the order of registration."""

    elements: int
    own_bucket: bool = False
    """A tied embedding that stands on two pipeline stages."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What is reduced and gathered in one piece. Positions count elements from the start of the buffer."""

    start: int
    end: int
    """Padding included."""
    parameters: tuple[tuple[int, int], ...]
    """(start, end) of each parameter, in ascending order."""

    def owned_elements(self, data_parallel_size: int) -> list[int]:
        """Per data-parallel rank, the elements of parameters that it updates; padding has no optimizer state."""
        part = (self.end - self.start) // data_parallel_size
        owned = [0] * data_parallel_size
        for start, end in self.parameters:
            position = start
            while position < end:
                rank = (position - self.start) // part
                stop = min(end, self.start + (rank + 1) * part)
                owned[rank] += stop - position
                position = stop
        return owned


def default_bucket_size(data_parallel_size: int) -> int:
    """Elements of a bucket when reduction is overlapped and --ddp-bucket-size is unset (megatron-core's rule)."""
    return max(DEFAULT_BUCKET_SIZE, DEFAULT_BUCKET_SIZE_PER_RANK * data_parallel_size)


def lay_out(shards: Sequence[TrainedShard], *, data_parallel_size: int, bucket_size: int | None) -> tuple[Bucket, ...]:
    """The buckets of one model chunk's buffer, of which each begins where the last one ends.

    ``bucket_size`` is None without overlapped reduction, on pipeline ranks above 0 and on later chunks.
    """
    divisor = math.lcm(data_parallel_size, BUCKET_ALIGNMENT)
    buckets: list[Bucket] = []
    open_parameters: list[tuple[int, int]] = []
    bucket_start = position = 0

    def close() -> int:
        end = _round_up(position, divisor)
        buckets.append(Bucket(start=bucket_start, end=end, parameters=tuple(open_parameters)))
        open_parameters.clear()
        return end

    for shard in reversed(shards):
        position = _round_up(position, PARAMETER_ALIGNMENT)
        if shard.own_bucket and open_parameters:
            bucket_start = position = close()
        open_parameters.append((position, position + shard.elements))
        position += shard.elements
        full = bucket_size is not None and position - bucket_start >= bucket_size
        if full or shard.own_bucket:
            bucket_start = position = close()
    if open_parameters:
        close()
    return tuple(buckets)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
