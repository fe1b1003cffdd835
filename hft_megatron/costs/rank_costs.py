"""Bytes that a rank sends and holds under a plan, by formula.

Measured on megatron-core 0.16.1 (``_ParamAndGradBuffer``): parameters are laid out in reverse order of registration,
each starts at a multiple of 64 elements, bucket ends are padded to lcm(DP, 128), and a bucket closes once it holds
``bucket_size`` elements. A tied embedding gets a bucket of its own on pipelines. Every data-parallel rank owns an equal
part of every bucket (``DistributedOptimizer``), padding included, without regard to where parameters begin.

A rank's costs depend on its pipeline stage and its data-parallel rank alone: all tensor-parallel ranks hold tensors of
the same sizes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hft_megatron.config.derived import data_parallel_size
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.model.parameter_names import ChunkPlace, chunk_parameters, chunk_places, local_elements

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
LARGEST_BUCKET = 40_000_000
LEAST_OF_A_RANK = 1_000_000
"""Elements that each data-parallel rank has of a bucket, below which the start of a collective costs more than it
carries."""
MOST_BUCKETS = 16


@dataclass(frozen=True, kw_only=True)
class TrainedShard:
    """One trainable parameter of a rank, in the order of registration."""

    elements: int
    own_bucket: bool = False
    """True for a tied embedding that is on two pipeline stages."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Elements that are reduced and gathered in one piece. Positions count from the start of the buffer."""

    start: int
    end: int
    """End position, padding included."""
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


def default_bucket_size(trainable_elements: int, data_parallel_size: int) -> int:
    """Elements of a bucket when reduction is overlapped and --ddp-bucket-size is unset.

    megatron-core's ``max(40 M, 1 M x DP)`` is one bucket for a small model, so that nothing overlaps. Here that is the
    upper limit, and below it a 16th of what a chunk trains, or 1 M per data-parallel rank where that is more.
    """
    least = LEAST_OF_A_RANK * data_parallel_size
    return min(max(LARGEST_BUCKET, least), max(least, trainable_elements // MOST_BUCKETS))


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


FP32_BYTES = 4
"""Width of masters and both moments, whatever the weights are, and of gradients where nothing else is asked for."""
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class RankCosts:
    """Costs of one rank; bytes sent are those of one optimizer step."""

    trainable_parameters: int
    """Elements of the trainable tensors on this rank, rows that pad the vocabulary included."""
    gradient_bytes: int
    """Gradient buffers, padding included."""
    optimizer_bytes: int
    """First and second moments, and fp32 masters beside bf16 weights, of the part that this rank updates."""
    reduce_scatter_bytes: int
    """Passed to reduce-scatter over data-parallel ranks; 0 without such ranks."""
    all_gather_bytes: int
    """Filled by all-gather over data-parallel ranks; 0 without such ranks."""

    def __add__(self, other: "RankCosts") -> "RankCosts":
        names = [field.name for field in fields(self)]
        return RankCosts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """A model on a layout: everything except the plan that the costs depend on. Valid options assumed."""

    shape: ModelShape
    parallel: ParallelConfig
    world_size: int
    bf16: bool
    fp32_gradients: bool = True
    """--accumulate-allreduce-grads-in-fp32; beside fp32 weights gradients are fp32 anyway."""
    vocab_multiple: int = 1
    """--make-vocab-size-divisible-by."""

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return data_parallel_size(self.parallel, self.world_size)

    @property
    def gradient_width(self) -> int:
        """Bytes of one weight's gradient, as it is added up and reduced."""
        return FP32_BYTES if self.fp32_gradients or not self.bf16 else BF16_BYTES

    def stage_costs(self, trains: Callable[[str], bool], pipeline_rank: int) -> tuple[RankCosts, ...]:
        """Costs of a pipeline stage's ranks by data-parallel rank, when the units train for which ``trains`` is true.

        Source: ``DistributedDataParallel`` and ``DistributedOptimizer`` of megatron-core 0.16.1, exact for that
        version; ``wire_bytes`` has the rules.
        """
        data_size = self.data_size
        parameters = elements = 0
        owned = [0] * data_size
        for buckets in self.stage_buckets(trains, pipeline_rank):
            parameters += sum(end - start for bucket in buckets for start, end in bucket.parameters)
            elements += buckets[-1].end if buckets else 0
            for bucket in buckets:
                owned = [sum(pair) for pair in zip(owned, bucket.owned_elements(data_size), strict=True)]
        weight_bytes = BF16_BYTES if self.bf16 else FP32_BYTES
        # An fp32 weight is its own master.
        state_bytes = (3 if self.bf16 else 2) * FP32_BYTES
        sent = elements if data_size > 1 else 0
        return tuple(
            RankCosts(
                trainable_parameters=parameters,
                gradient_bytes=self.gradient_width * elements,
                optimizer_bytes=state_bytes * count,
                reduce_scatter_bytes=self.gradient_width * sent,
                all_gather_bytes=weight_bytes * sent,
            )
            for count in owned
        )

    def stage_buckets(self, trains: Callable[[str], bool], pipeline_rank: int) -> tuple[tuple[Bucket, ...], ...]:
        """The buckets of each model chunk of a pipeline stage, bottom chunk first."""
        places = chunk_places(self.shape, self.parallel, pipeline_rank)
        return tuple(
            # Reduction is off the critical path on later stages and chunks: one bucket there.
            self._buckets(trains, place, is_bucketed=pipeline_rank == 0 and index == 0)
            for index, place in enumerate(places)
        )

    def _buckets(self, trains: Callable[[str], bool], place: ChunkPlace, *, is_bucketed: bool) -> tuple[Bucket, ...]:
        """Buckets of one chunk, whose trainable parameters all have one data type and so share one buffer."""
        parallel = self.parallel
        tied_over_stages = self.shape.tie_embeddings and parallel.pipeline_model_parallel_size > 1
        shards = [
            TrainedShard(
                elements=local_elements(
                    name,
                    self.shape,
                    tensor_size=parallel.tensor_model_parallel_size,
                    vocab_multiple=self.vocab_multiple,
                ),
                own_bucket=name.is_vocab and tied_over_stages,
            )
            for name in chunk_parameters(place, self.shape)
            if trains(name.unit)
        ]
        size = None
        if is_bucketed and parallel.overlap_grad_reduce:
            elements = sum(shard.elements for shard in shards)
            size = parallel.ddp_bucket_size or default_bucket_size(elements, self.data_size)
        return lay_out(shards, data_parallel_size=self.data_size, bucket_size=size)
