"""What every rank of a layout holds while it trains, by formula: weights, gradients, optimizer, activations, logits."""

from collections.abc import Callable
from dataclasses import dataclass

from hft_megatron.config import derived
from hft_megatron.config.derived import virtual_pipeline_size
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import MethodName, RunConfig, TrainingConfig
from hft_megatron.model.parameter_names import chunk_parameters, chunk_places, local_elements
from hft_megatron.optimizer.activations import ActivationModel, ChunkActivations, MicroBatch
from hft_megatron.optimizer.rank_costs import BF16_BYTES, FP32_BYTES, CostModel


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank. The device's own needs (CUDA's context, the allocator's gaps, NCCL's buffers) aren't in it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What all micro-batches in flight keep, and what a layer's backward pass needs beyond the room of the logits."""
    logits: int

    @property
    def before_activations(self) -> int:
        """What is there whatever the batch is."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return self.before_activations + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """A model on a layout, and the batch that a rank works on. Valid options assumed."""

    costs: CostModel
    training: TrainingConfig
    """Its --recompute- options are read."""
    micro_batch: MicroBatch
    on_cuda: bool = True
    """Whether the rank's device is a GPU; on a CPU norms keep more."""
    micro_batches: int | None = None
    """Of a step on one data-parallel rank; None: as many as the pipeline can have in flight."""

    def stage(self, trains: Callable[[str], bool], pipeline_rank: int) -> RankMemory:
        """The rank of a pipeline stage that holds most, when the units train for which ``trains`` is true."""
        costs = self.costs
        places = chunk_places(costs.shape, costs.parallel, pipeline_rank)
        of_rank = max(costs.stage_costs(trains, pipeline_rank), key=lambda rank: rank.optimizer_bytes)
        elements = sum(
            local_elements(
                name,
                costs.shape,
                tensor_size=costs.parallel.tensor_model_parallel_size,
                vocab_multiple=costs.vocab_multiple,
            )
            for place in places
            for name in chunk_parameters(place, costs.shape)
        )
        model = ActivationModel(
            shape=costs.shape,
            parallel=costs.parallel,
            training=self.training,
            bf16=costs.bf16,
            micro_batch=self.micro_batch,
            on_cuda=self.on_cuda,
            vocab_multiple=costs.vocab_multiple,
        )
        chunks = [model.of_chunk(place, trains) for place in places]
        logits, working = (max(getattr(chunk, name) for chunk in chunks) for name in ("logits", "working"))
        return RankMemory(
            weights=(BF16_BYTES if costs.bf16 else FP32_BYTES) * elements,
            gradients=of_rank.gradient_bytes,
            optimizer=of_rank.optimizer_bytes,
            # The loss is over when the first layer goes backward.
            activations=self._in_flight(chunks, pipeline_rank) + max(0, working - logits),
            logits=logits,
        )

    def largest(self, trains: Callable[[str], bool]) -> RankMemory:
        """The rank of the whole layout that holds most."""
        stages = range(self.costs.parallel.pipeline_model_parallel_size)
        return max((self.stage(trains, stage) for stage in stages), key=lambda rank: rank.total)

    def _in_flight(self, chunks: list[ChunkActivations], pipeline_rank: int) -> int:
        """Bytes of the passes that have gone forward and not yet backward, by megatron-core's schedules."""
        parallel, stages = self.costs.parallel, self.costs.parallel.pipeline_model_parallel_size
        of_all = sum(chunk.kept for chunk in chunks)
        virtual = virtual_pipeline_size(parallel, self.costs.shape.num_layers)
        if virtual is None:
            passes = stages - pipeline_rank
            return of_all * (passes if self.micro_batches is None else min(passes, self.micro_batches))
        # The interleaved schedule warms up with this many passes over single chunks, and one more is under way.
        passes = 2 * (stages - pipeline_rank - 1) + (virtual - 1) * stages + 1
        if self.micro_batches is not None:
            passes = min(passes, virtual * self.micro_batches)
        return round(of_all / virtual * passes)


def memory_of_run(
    method: MethodName, config: RunConfig, shape: ModelShape, world_size: int, *, bf16: bool, on_cuda: bool
) -> MemoryModel:
    """The memory of a run's ranks, with sequences of --seq-length; without the reference of preferences."""
    training, data_size = config.training, derived.data_parallel_size(config.parallel, world_size)
    # A pair is two sequences.
    sequences = training.micro_batch_size * (2 if method == "dpo" else 1)
    return MemoryModel(
        costs=CostModel(
            shape=shape,
            parallel=config.parallel,
            world_size=world_size,
            bf16=bf16,
            vocab_multiple=config.model.make_vocab_size_divisible_by,
        ),
        training=training,
        on_cuda=on_cuda,
        micro_batch=MicroBatch(sequences=sequences, seq_length=derived.sequence_length(training, shape)),
        # None at all is the batch's mistake, and said elsewhere.
        micro_batches=max(1, derived.global_batch_size(config, world_size) // (training.micro_batch_size * data_size)),
    )


def in_bytes(count: float) -> str:
    """``16.8 MB``: decimal units, as everywhere in this project."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} bytes"
