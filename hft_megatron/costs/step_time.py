"""The time of a training step by formula, of any plan on any layout: no torch, no ranks, and no measurement.

The model, for a pipeline of p stages with v chunks each, and m micro-batches:

- A micro-batch takes a stage the sum over its parts (``part_times``): forward products; gradients of inputs from the
  lowest weight that trains upwards, and of the weights that train; what recomputation makes again; passes over memory;
  tensor-parallel ranks exchange. The walk that FLOPs are counted by (``parts``) says which of these there are.
- A stage sends hidden states up and gradients down once for each boundary and micro-batch. With interleaved chunks and
  --overlap-p2p-communication compute hides that, as far as there is any.
- All m micro-batches take m times the slowest stage, and a bubble of (sum over stages - the slowest) / v: that is (p -
  1) / v micro-batches where stages are even (Narayanan et al., arXiv 2104.04473, section 2.2).
- Data-parallel ranks send (n - 1) / n of the gradient and weight buffers, whose bytes are those of ``rank_costs``. A
  later stage ends its backward passes earlier and reduces meanwhile, and one that overlaps its gather begins it when
  the first hidden states are there. Under --overlap-grad-reduce the backward pass of the last micro-batch hides all but
  the last bucket, under --overlap-param-gather the forward pass of the first one all but the bucket that is needed
  first; at most as much as they take.
- A tied embedding's gradient is summed over first and last stage.
- The optimizer reads and writes memory: of what a rank updates the gradient is scaled, its norm taken, and clipped;
  AdamW reads four numbers and writes three; beside bf16 weights masters are read and weights written. Buffers are
  written over and not cleared, but for an untied embedding's and under transformer-engine, which isn't counted.

It leaves out: the start of kernels and collectives, and Python's time; ranks that wait for each other by chance; the
allocator; the data; the sum of losses and of norms' gradients; compute that is slower while something is sent;
validation, checkpoints and switches of rounds. So steps take longer than it says, small models and small batches most;
anything that takes equally long with a plan and with full fine-tuning brings their ratio closer to 1. Every
sequence is one example as long as can be: packed or shorter ones have less attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from hft_megatron.config.derived import splits_sequences, virtual_pipeline_size
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.flops import head_forwards, step_flops
from hft_megatron.costs.part_times import Device, PartTimes, Phase
from hft_megatron.costs.parts import parts_of
from hft_megatron.costs.rank_costs import BF16_BYTES, FP32_BYTES, CostModel
from hft_megatron.costs.rank_memory import MicroBatch
from hft_megatron.hft.units import EMBEDDING_NAME
from hft_megatron.model.parameter_names import chunk_parameters, chunk_places, local_elements

ADAMW_BYTES = 7 * FP32_BYTES
"""Bytes per weight that a rank updates: weight, gradient and two moments are read, all but the gradient written."""
NORM_AND_CLIP_BYTES = 3 * FP32_BYTES
"""Bytes per weight: a gradient is read for the norm, and read and written to be clipped."""
CAST_BYTES = FP32_BYTES + BF16_BYTES
"""Bytes per weight, from fp32 to bf16 or back."""

Trains = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step: of the slowest stage, and of transfers that no compute hides."""

    forward: float
    """Products, attention included."""
    backward: float
    """Products for gradients."""
    recomputation: float
    elementwise: float
    """Norms, rotations, SwiGLU, residuals and the loss, in both directions."""
    tensor_parallel: float
    pipeline_sends: float
    """Sends between stages, and the sum of a tied embedding's gradient."""
    pipeline_bubble: float
    reduce_scatter: float
    all_gather: float
    gradient_buffer: float
    """Scaling, norm and clipping of the gradients that a rank updates with."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return float(sum(getattr(self, one.name) for one in fields(self)))


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Times of one pipeline stage, in seconds."""

    forward: Phase
    """Forward pass of a micro-batch in all chunks of the stage."""
    backward: Phase
    sends: float
    """Sends of a micro-batch, as far as no compute hides them."""
    reduce_scatter: float
    """Reduction after the stage's last backward pass."""
    all_gather: float
    gradient_buffer: float
    optimizer: float

    @property
    def micro_batch(self) -> float:
        """Seconds of both passes."""
        return self.forward.total + self.backward.total + self.sends


@dataclass(frozen=True, kw_only=True)
class StepTimeModel:
    """A model on a layout of devices, and the batch of a step. Valid options assumed."""

    costs: CostModel
    training: TrainingConfig
    """Its --recompute- options are read."""
    micro_batch: MicroBatch
    micro_batches: int
    """Micro-batches of a step on one data-parallel rank."""
    device: Device

    def of(self, trains: Trains) -> StepTime:
        """Time of a step that trains the units for which ``trains`` is true."""
        stages = self._stages(trains)
        slowest = max(stages, key=lambda stage: stage.micro_batch)
        last_to_update = max(stages, key=lambda stage: stage.gradient_buffer + stage.optimizer)
        forward, backward, count = slowest.forward, slowest.backward, self.micro_batches
        return StepTime(
            forward=count * forward.products,
            backward=count * backward.products,
            recomputation=count * backward.recomputed,
            elementwise=count * (forward.elementwise + backward.elementwise),
            tensor_parallel=count * (forward.collectives + backward.collectives),
            pipeline_sends=count * slowest.sends + self._tied_embedding(trains),
            pipeline_bubble=(sum(stage.micro_batch for stage in stages) - slowest.micro_batch) / self._turns,
            reduce_scatter=self._reduction(stages),
            all_gather=self._gathering(stages),
            gradient_buffer=last_to_update.gradient_buffer,
            optimizer=last_to_update.optimizer,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all ranks."""
        return self.micro_batches * self.micro_batch.tokens * self.costs.data_size

    def model_flops(self) -> int:
        """FLOPs of a step, on all ranks: those of full fine-tuning, whatever trains (``flops``)."""
        flops = step_flops(
            self.costs.shape,
            self.costs.parallel,
            self.training,
            lambda unit: True,
            micro_batch_tokens=self.micro_batch.tokens,
            vocab_multiple=self.costs.vocab_multiple,
        )
        return flops.model.of(self.tokens, self.tokens * self.micro_batch.seq_length)

    def _stages(self, trains: Trains) -> list[_Stage]:
        count = self.costs.parallel.pipeline_model_parallel_size
        passes = [(Phase(), Phase()) for _ in range(count)]
        times = PartTimes(costs=self.costs, micro_batch=self.micro_batch, device=self.device)
        head = head_forwards(
            self.costs.shape,
            self._tensor_size,
            micro_batch_tokens=self.micro_batch.tokens,
            vocab_multiple=self.costs.vocab_multiple,
        )
        for part in parts_of(self.costs.shape, self.costs.parallel, self.training, trains, head_forwards=head):
            both = zip(passes[part.chunk % count], times.of(part), strict=True)
            forward, backward = (one + other for one, other in both)
            passes[part.chunk % count] = forward, backward
        return [self._stage(trains, number, *phases) for number, phases in enumerate(passes)]

    def _stage(self, trains: Trains, number: int, forward: Phase, backward: Phase) -> _Stage:
        costs, parallel, memory = self.costs, self.costs.parallel, self.device.memory_seconds
        rank = max(costs.stage_costs(trains, number), key=lambda rank: rank.optimizer_bytes)
        updated = rank.optimizer_bytes // ((3 if costs.bf16 else 2) * FP32_BYTES)
        unhidden = self._last_bucket(trains, number)
        sends = self._sends(number)
        hides = self.device.sends_beside_compute
        if hides and parallel.overlap_p2p_communication and self._turns > 1:
            sends = max(0.0, sends - forward.total - backward.total)
        cast = CAST_BYTES * costs.bf16
        # Gradients in bf16 are copied into fp32 for the norm.
        of_norm = NORM_AND_CLIP_BYTES + (CAST_BYTES if costs.gradient_width < FP32_BYTES else 0)
        return _Stage(
            forward=forward,
            backward=backward,
            sends=sends,
            reduce_scatter=_exposed(
                self._data_ring(rank.reduce_scatter_bytes),
                backward.total / self._turns if hides and parallel.overlap_grad_reduce else 0.0,
                unhidden,
            ),
            all_gather=_exposed(
                self._data_ring(rank.all_gather_bytes),
                forward.total / self._turns if hides and parallel.overlap_param_gather else 0.0,
                unhidden,
            ),
            gradient_buffer=memory(updated * (2 * costs.gradient_width + of_norm)),
            optimizer=memory(updated * (ADAMW_BYTES + cast)),
        )

    def _last_bucket(self, trains: Trains, number: int) -> float:
        """The share of a stage's buffers that is complete last and needed first: the bottom of its lowest chunk."""
        chunks = [buckets for buckets in self.costs.stage_buckets(trains, number) if buckets]
        sizes = [bucket.end - bucket.start for buckets in chunks for bucket in buckets]
        return (chunks[0][-1].end - chunks[0][-1].start) / sum(sizes) if chunks else 0.0

    def _sends(self, number: int) -> float:
        """Seconds per micro-batch: hidden states to the stage above and gradients to the one below, for every chunk."""
        costs, places = self.costs, chunk_places(self.costs.shape, self.costs.parallel, number)
        boundaries = sum((not place.is_first) + (not place.is_last) for place in places)
        if costs.parallel.pipeline_model_parallel_size == 1:
            return 0.0
        cut = self._tensor_size if splits_sequences(costs.parallel) else 1
        width = BF16_BYTES if costs.bf16 else FP32_BYTES
        bytes = width * self.micro_batch.tokens * costs.shape.hidden_size // cut
        return boundaries * bytes / self._between_stages

    def _reduction(self, stages: list[_Stage]) -> float:
        """Exposed seconds of the reductions after the last backward pass, which is the first stage's."""
        ahead, added = 0.0, 0.0
        for stage in stages:
            added = max(added, stage.reduce_scatter - ahead)
            ahead += stage.backward.total / self._turns
        return added

    def _gathering(self, stages: list[_Stage]) -> float:
        """Exposed seconds of the gather. Overlapped, a stage begins when the first hidden states reach it, one stage
        after the other; else all begin when they have updated."""
        times = [stage.all_gather for stage in stages]
        return sum(times) if self.costs.parallel.overlap_param_gather else max(times)

    def _tied_embedding(self, trains: Trains) -> float:
        costs = self.costs
        several = costs.parallel.pipeline_model_parallel_size > 1
        if not (several and costs.shape.tie_embeddings and trains(EMBEDDING_NAME)):
            return 0.0
        first, *_ = chunk_places(costs.shape, costs.parallel, 0)
        [name] = [name for name in chunk_parameters(first, costs.shape) if name.is_vocab]
        elements = local_elements(name, costs.shape, tensor_size=self._tensor_size, vocab_multiple=costs.vocab_multiple)
        # An all-reduce between two ranks.
        return costs.gradient_width * elements / self._between_stages

    def _data_ring(self, bytes: int) -> float:
        return self.device.ring_seconds(bytes, ranks=self.costs.data_size, stride=self._tensor_size)

    @property
    def _between_stages(self) -> float:
        """Bytes per second: stages are as far apart as can be (megatron-core's order ``tp-cp-ep-dp-pp``)."""
        crosses = self.costs.world_size > self.device.devices_per_node
        return 1e9 * (self.device.network_bandwidth if crosses else self.device.node_bandwidth)

    @property
    def _turns(self) -> int:
        """Chunks of a stage."""
        return virtual_pipeline_size(self.costs.parallel, self.costs.shape.num_layers) or 1

    @property
    def _tensor_size(self) -> int:
        return self.costs.parallel.tensor_model_parallel_size


def _exposed(seconds: float, compute: float, unhidden: float) -> float:
    """Exposed seconds of a transfer beside ``compute``, which hides all but the share ``unhidden`` of it."""
    return seconds - min(seconds * (1 - unhidden), compute)
