"""The memory of a rank by formula: weights, gradients, optimizer, activations and logits.

Counted from what our layers and megatron-core's save. A change of a layer changes the first constants here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hft_megatron.config import derived
from hft_megatron.config.adapters import ADAPTER_PARTS, has_adapter
from hft_megatron.config.derived import padded_vocab_size, tokens_of_a_chunk, virtual_pipeline_size
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.rank_costs import BF16_BYTES, FP32_BYTES, CostModel, RankCosts
from hft_megatron.hft.units import (
    ATTENTION_IN,
    ATTENTION_OUT,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    MLP_IN,
    MLP_OUT,
    NAMES_IN_LAYER,
)
from hft_megatron.model.parameter_names import ChunkPlace, chunk_parameters, chunk_places, local_elements, whole_shape

SWIGLU_TENSORS = 2
"""Tensors of the feed-forward size: gate and up."""
ROPE_TENSORS = 2
"""Tensors of one head's channels and all positions, once for all layers: cosines and sines."""
BACKWARD_TENSORS = 1
"""Tensors of the feed-forward size: gradients in a layer's backward pass beyond the memory it has freed by then."""
MASK_BYTES = 1
"""Bytes of one entry of a dropout mask."""
LOGIT_BYTES = {"bf16": 6, "fp32": 4}
"""Bytes per token of a chunk and row of the vocabulary: fp32 softmax, with bf16 also logits or their gradient."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Input of one forward pass on one data-parallel rank."""

    sequences: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.sequences * self.seq_length


@dataclass(frozen=True, kw_only=True)
class ChunkActivations:
    """Bytes of one micro-batch on one model chunk."""

    kept: int
    """Bytes held from the forward pass until the backward pass."""
    working: int
    """Peak bytes in the backward pass of one layer, or of one recomputed unit of layers."""
    logits: int
    """Bytes of logits, softmax and gradients between forward and backward pass, on the chunk with the head."""


@dataclass(frozen=True, kw_only=True)
class ActivationModel:
    """Everything that a rank's activations depend on besides the plan and the place of its chunks."""

    shape: ModelShape
    parallel: ParallelConfig
    training: TrainingConfig
    """Its --recompute- options are read."""
    bf16: bool
    micro_batch: MicroBatch
    on_cuda: bool
    """True on a GPU, where a norm keeps its input as it is; on a CPU it keeps it in fp32."""
    vocab_multiple: int = 1

    def of_chunk(self, place: ChunkPlace, trains: Callable[[str], bool]) -> ChunkActivations:
        """Activations of a chunk when the units train for which ``trains`` is true."""
        layers = range(place.first_layer, place.first_layer + place.layers)
        recomputed = self._recomputed(layers)
        # What a later stage receives always needs a gradient; so does a frozen embedding's output below recomputation.
        flows = not place.is_first or trains(EMBEDDING_NAME)
        units = [f"model.layers.{layer}.{module}" for layer in recomputed for module in NAMES_IN_LAYER]
        flows |= any(map(trains, [*units, *(f"{unit}.{part}" for unit in units for part in self._parts(unit))]))
        received = 0 if place.is_first else self._hidden
        rope = ROPE_TENSORS * self._size * self.shape.kv_channels * self.micro_batch.seq_length
        kept, working = received + rope, 0
        unit = self._unit_of_recomputation()
        for layer in layers:
            full, flows_after = self._layer(layer, trains, flows)
            if layer in recomputed:
                # The input of a unit of layers is kept; everything else is recomputed in the unit's own backward pass.
                is_first_of_unit = (layer - place.first_layer) % unit == 0
                kept += self._hidden * (is_first_of_unit and flows)
                working = max(working, full * unit) if flows else working
            else:
                kept += full
            flows = flows_after if layer not in recomputed else flows
        if flows:
            working += self._backward + self._recomputed_attention
        if not place.is_last:
            return ChunkActivations(kept=kept, working=working, logits=0)
        norm, _ = self._norm(trains(FINAL_NORM_NAME), flows)
        head = EMBEDDING_NAME if self.shape.tie_embeddings else "lm_head"
        kept += norm + self._hidden * trains(head)
        return ChunkActivations(kept=kept, working=working, logits=self._logits(is_trained=trains(head)))

    def _layer(self, layer: int, trains: Callable[[str], bool], flows: bool) -> tuple[int, bool]:
        """Bytes that a layer keeps, and whether its output needs a gradient when its input does or does not."""

        def train(*modules: str) -> bool:
            units = [f"model.layers.{layer}.{module}" for module in modules]
            adapters = [f"{unit}.{part}" for unit in units for part in self._parts(unit)]
            return any(map(trains, [*units, *adapters]))

        def keep(*modules: str) -> bool:
            """True if their input is kept as it is; dropout gives each adapter another one."""
            units = (f"model.layers.{layer}.{module}" for module in modules)
            return train(*modules) if not self._drops else any(map(trains, units))

        shape, tokens, size = self.shape, self.micro_batch.tokens, self._size
        queries = shape.num_attention_heads * shape.kv_channels // self._tensor_size
        keys = shape.num_query_groups * shape.kv_channels // self._tensor_size
        kept, flows = self._norm(train("input_layernorm"), flows)
        kept += self._hidden * keep(*ATTENTION_IN) + self._of_adapters(ATTENTION_IN, flows)
        flows |= train(*ATTENTION_IN)
        out = size * tokens * queries
        if flows:
            kept += size * tokens * (queries + 2 * keys)
            if not self._attention_is_recomputed:
                kept += out + self._log_sums
        if keep(ATTENTION_OUT) and (self._attention_is_recomputed or not flows):
            kept += out  # elsewhere the attention keeps it already
        kept += self._of_adapters((ATTENTION_OUT,), flows)
        flows |= train(ATTENTION_OUT)
        norm, flows = self._norm(train("post_attention_layernorm"), flows)
        kept += norm + self._hidden * keep(*MLP_IN) + self._of_adapters(MLP_IN, flows)
        flows |= train(*MLP_IN)
        ffn = size * tokens * shape.ffn_hidden_size // self._tensor_size
        kept += ffn * (SWIGLU_TENSORS * flows + keep(MLP_OUT)) + self._of_adapters((MLP_OUT,), flows)
        return kept, flows or train(MLP_OUT)

    def _parts(self, unit: str) -> tuple[str, ...]:
        return ADAPTER_PARTS if has_adapter(unit, self.shape.adapters) else ()

    @property
    def _drops(self) -> bool:
        return self.shape.adapters is not None and self.shape.adapters.dropout > 0

    def _of_adapters(self, modules: Sequence[str], flows: bool) -> int:
        """Bytes that the adapters of matrices keep beyond these matrices' input: A x, and with dropout each an input of
        its own, and where that needs a gradient (``flows``) the mask."""
        adapters, kept = self.shape.adapters, 0
        for module in modules:
            if adapters is not None and has_adapter(module, adapters):
                cut = self._tensor_size if module in (ATTENTION_OUT, MLP_OUT) else 1
                columns = whole_shape(module, self.shape)[1] // cut
                kept += self._size * adapters.rank
                kept += (self._size + MASK_BYTES * flows) * columns * self._drops
        return self.micro_batch.tokens * kept

    def _norm(self, is_trained: bool, flows: bool) -> tuple[int, bool]:
        """Bytes that a norm keeps, and whether its output needs a gradient."""
        elements = self._hidden // self._size
        input_bytes = self._size if self.on_cuda else FP32_BYTES
        kept = (input_bytes * elements + FP32_BYTES * elements // self.shape.hidden_size) * flows
        return kept + self._hidden * is_trained, flows or is_trained

    def _logits(self, *, is_trained: bool) -> int:
        """Bytes with the gradients that the head's backward pass gives to autograd: of its input, and of its weight,
        whose real gradient is in the gradient buffer."""
        rows = padded_vocab_size(self.shape, self._tensor_size, self.vocab_multiple) // self._tensor_size
        tokens = tokens_of_a_chunk(self.micro_batch.tokens, rows)
        gradients = self._size * self.shape.hidden_size * (self.micro_batch.tokens + rows * is_trained)
        return LOGIT_BYTES["bf16" if self.bf16 else "fp32"] * tokens * rows + gradients

    def _recomputed(self, layers: Sequence[int]) -> Sequence[int]:
        """The layers of a chunk whose whole forward pass is recomputed."""
        training = self.training
        if training.recompute_granularity != "full":
            return ()
        return layers if training.recompute_method == "uniform" else layers[: training.recompute_num_layers]

    def _unit_of_recomputation(self) -> int:
        """Layers that are recomputed together."""
        uniform = self.training.recompute_method == "uniform"
        return (self.training.recompute_num_layers or 1) if uniform else 1

    @property
    def _attention_is_recomputed(self) -> bool:
        return self.training.recompute_granularity == "selective"

    @property
    def _recomputed_attention(self) -> int:
        """Bytes that selective recomputation restores, of one layer."""
        queries = self.shape.num_attention_heads * self.shape.kv_channels // self._tensor_size
        again = self._size * self.micro_batch.tokens * queries + self._log_sums
        return again * self._attention_is_recomputed

    @property
    def _log_sums(self) -> int:
        """The logarithms of the softmax's sums, one per head and query, in fp32."""
        return FP32_BYTES * self.micro_batch.tokens * self.shape.num_attention_heads // self._tensor_size

    @property
    def _backward(self) -> int:
        """Gradients in a layer's backward pass: of the feed-forward block, of its input, and of the residual."""
        ffn = self.shape.ffn_hidden_size // self._tensor_size
        return self._size * self.micro_batch.tokens * (BACKWARD_TENSORS * ffn + 2 * self.shape.hidden_size)

    @property
    def _hidden(self) -> int:
        """Bytes of a hidden state as it is kept, which sequence parallelism cuts."""
        cut = self._tensor_size if self.parallel.sequence_parallel else 1
        return self._size * self.micro_batch.tokens * self.shape.hidden_size // cut

    @property
    def _size(self) -> int:
        """Bytes of an element of the model's data type."""
        return 2 if self.bf16 else FP32_BYTES

    @property
    def _tensor_size(self) -> int:
        return self.parallel.tensor_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank, without the device's own needs (CUDA's context, the allocator's gaps, NCCL's buffers)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Bytes kept by all micro-batches in flight, and of a layer's backward pass beyond the memory of the logits; with
    bf16 gradients at least what the optimizer's fp32 copies of them need beyond it."""
    logits: int

    @property
    def before_activations(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes in total."""
        return self.before_activations + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """A model on a layout, and the batch that a rank works on. Valid options assumed."""

    costs: CostModel
    training: TrainingConfig
    """Its --recompute- options are read."""
    micro_batch: MicroBatch
    on_cuda: bool = True
    """True if the rank's device is a GPU; on a CPU norms keep more."""
    micro_batches: int | None = None
    """Micro-batches of a step on one data-parallel rank; None: as many as the pipeline can have in flight."""
    holds_fisher: bool = False
    """True if weights are held to earlier tasks (--ewc-lambda): Fisher information and anchors beside the moments."""

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
        # The loss is done when the first layer's backward pass begins.
        activations = self._in_flight(chunks, pipeline_rank) + max(0, working - logits)
        return RankMemory(
            weights=(BF16_BYTES if costs.bf16 else FP32_BYTES) * elements,
            gradients=of_rank.gradient_bytes,
            optimizer=of_rank.optimizer_bytes + self._fisher(of_rank),
            activations=max(activations, self._gradient_copies(of_rank) - logits),
            logits=logits,
        )

    def _fisher(self, rank: RankCosts) -> int:
        """Bytes of two fp32 numbers for each of which the optimizer has two moments and, beside bf16, a master."""
        numbers = 3 if self.costs.bf16 else 2
        return rank.optimizer_bytes * 2 // numbers if self.holds_fisher else 0

    def _gradient_copies(self, rank: RankCosts) -> int:
        """Bytes of the fp32 copies that the optimizer makes of gradients in another data type, once all activations are
        freed."""
        is_needed = self.costs.gradient_width < FP32_BYTES
        return rank.optimizer_bytes // 3 if is_needed else 0  # As large as the masters, one of three.

    def largest(self, trains: Callable[[str], bool]) -> RankMemory:
        """The rank of the whole layout that holds most."""
        stages = range(self.costs.parallel.pipeline_model_parallel_size)
        return max((self.stage(trains, stage) for stage in stages), key=lambda rank: rank.total)

    def _in_flight(self, chunks: list[ChunkActivations], pipeline_rank: int) -> int:
        """Bytes of the forward passes whose backward pass is still to come, by megatron-core's schedules."""
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
    config: RunConfig, shape: ModelShape, world_size: int, *, sequences_per_sample: int, bf16: bool, on_cuda: bool
) -> MemoryModel:
    """The memory of a run's ranks, with sequences of --seq-length; leaves out a model that the trained one is compared
    with."""
    training, data_size = config.training, derived.data_parallel_size(config.parallel, world_size)
    return MemoryModel(
        costs=CostModel(
            shape=shape,
            parallel=config.parallel,
            world_size=world_size,
            bf16=bf16,
            fp32_gradients=training.accumulate_allreduce_grads_in_fp32,
            vocab_multiple=config.model.make_vocab_size_divisible_by,
        ),
        training=training,
        on_cuda=on_cuda,
        holds_fisher=config.ewc.ewc_lambda > 0,
        micro_batch=MicroBatch(
            sequences=training.micro_batch_size * sequences_per_sample,
            seq_length=derived.sequence_length(training, shape),
        ),
        # None at all is an error of the batch size, and is reported elsewhere.
        micro_batches=max(1, derived.global_batch_size(config, world_size) // (training.micro_batch_size * data_size)),
    )


def in_bytes(count: float, precision: int = 1) -> str:
    """``16.8 MB``, in decimal units."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.{precision}f} {unit}"
    return f"{count:.0f} bytes"
