"""The time of one micro-batch in one part of the model, by formula: products, passes over memory, and transfers
between tensor-parallel ranks.

A product takes the longer of its FLOPs at the device's sustained rate and its bytes at the memory's bandwidth (the
roofline of Williams, Waterman and Patterson, 2009). Everything else is bound by memory: the tensors that its
kernels read and write are counted from ``model/layers.py`` and ``model/head.py``, and a change there changes the
first constants here. A ring of n ranks sends (n - 1) / n of a tensor in an all-gather or a reduce-scatter and twice
that in an all-reduce, so that sequence parallelism sends as much as tensor parallelism without it (Korthikanti et al.,
arXiv 2205.05198), but for the input that is gathered again where a matrix trains.
"""

from dataclasses import dataclass, fields

from hft_megatron.config.derived import padded_vocab_size, splits_sequences, tokens_of_a_chunk
from hft_megatron.costs.flops import attention_flops
from hft_megatron.costs.parts import MATRICES, Part
from hft_megatron.costs.rank_costs import BF16_BYTES, FP32_BYTES, CostModel
from hft_megatron.costs.rank_memory import MicroBatch
from hft_megatron.model.parameter_names import whole_shape

NORM = (2, 3)
"""Hidden states that a norm's one kernel reads and writes, forward and backward."""
RESIDUAL = (3, 3)
"""Hidden states of a block's sum with the residual, and of the sum of the two gradients."""
ROTATION = (9, 9)
"""Queries and keys: two products, a roll and a sum."""
ATTENTION_OUTPUT = (2, 2)
"""A copy into the order of the tokens."""
SWIGLU = (5, 11)
"""Tensors of the feed-forward size."""
LOSS = (6, 4)
"""fp32 logits: maximum, difference, exponential and sum; softmax and its product with the loss's gradient."""
LOGITS_AGAIN = 4
"""fp32 logits where they were dropped: difference and exponential."""
ATTENTION_BACKWARD = 2.5
"""Cost relative to a flash kernel's forward pass: five products to two, one of them the recomputed scores."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Sustained rates of a device. Bandwidths are GB (1e9 bytes) per second, of links per device and direction."""

    tflops: float
    """Rate of matrix products, in 1e12 FLOP per second."""
    weight_gradient_tflops: float | None = None
    """Rate of products that are added to a gradient; None: the same."""
    attention_tflops: float | None = None
    """Rate of attention kernels; None: the same."""
    memory_bandwidth: float
    node_bandwidth: float
    """Bandwidth between devices of a node."""
    network_bandwidth: float
    """Bandwidth between nodes."""
    devices_per_node: int
    sends_beside_compute: bool = True
    """True if compute hides concurrent transfers; not on a CPU that computes with all of its cores."""

    def product_seconds(self, flops: float, bytes: float, *, of_weights: bool = False) -> float:
        """Seconds of a product that computes and moves this much; ``of_weights`` for weight gradients."""
        rate = (self.weight_gradient_tflops if of_weights else None) or self.tflops
        return max(flops / (rate * 1e12), self.memory_seconds(bytes))

    def attention_seconds(self, flops: float) -> float:
        """Seconds of a kernel that computes this much and hardly reads memory."""
        return flops / ((self.attention_tflops or self.tflops) * 1e12)

    def memory_seconds(self, bytes: float) -> float:
        """Seconds of a kernel that only moves this much."""
        return bytes / (self.memory_bandwidth * 1e9)

    def ring_seconds(self, bytes: float, *, ranks: int, stride: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of ``bytes`` over ``ranks`` whose numbers are ``stride`` apart.

        Beyond one node the ring has as many links between two nodes as it has ranks on one, as NCCL's have.
        """
        if ranks == 1:
            return 0.0
        bandwidth = self.node_bandwidth
        if ranks * stride > self.devices_per_node:
            links = max(self.devices_per_node // stride, 1)
            bandwidth = min(bandwidth, links * self.network_bandwidth)
        return bytes * (ranks - 1) / ranks / (bandwidth * 1e9)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of one micro-batch, in one direction."""

    products: float = 0.0
    """Products of the forward pass, or of gradients; attention included."""
    elementwise: float = 0.0
    collectives: float = 0.0
    """Collectives of tensor-parallel ranks, as far as no product hides them."""
    recomputed: float = 0.0
    """Forward pass that is recomputed in the backward pass."""

    @property
    def total(self) -> float:
        """Seconds of the whole phase."""
        return self.products + self.elementwise + self.collectives + self.recomputed

    def __add__(self, other: "Phase") -> "Phase":
        return Phase(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


@dataclass(frozen=True, kw_only=True)
class PartTimes:
    """Times of a micro-batch on a layout of a device. Valid options assumed."""

    costs: CostModel
    micro_batch: MicroBatch
    device: Device

    def of(self, part: Part) -> tuple[Phase, Phase]:
        """The forward and the backward phase of a part."""
        forward = Phase(
            products=self._forward_products(part),
            elementwise=self._elementwise(part, backward=False),
            collectives=self._forward_collectives(part),
        )
        if not part.goes_backward and part.forwards == 1:
            return forward, Phase()
        again = forward.total * (part.forwards - 1)
        if part.kind == "head":
            # Only the product and the passes up to the softmax, of tokens that are gathered once anyway.
            again = (forward.products + self._logits(LOGITS_AGAIN, conversions=1)) * (part.forwards - 1)
        inputs, weights = self._gradient_products(part)
        return forward, Phase(
            products=inputs + weights,
            elementwise=self._elementwise(part, backward=True) if part.goes_backward else 0.0,
            collectives=self._backward_collectives(part, inputs, weights),
            recomputed=again,
        )

    # --- products

    def _forward_products(self, part: Part) -> float:
        if part.kind == "attention":
            return self._attention(1)
        return sum(self._product(unit, part) for unit in part.units if part.kind in MATRICES)

    def _gradient_products(self, part: Part) -> tuple[float, float]:
        """Seconds of the products for the gradients of the input and of the weights."""
        if part.kind == "attention":
            return self._attention(ATTENTION_BACKWARD) * part.goes_backward, 0.0
        if part.kind not in MATRICES:
            return 0.0, 0.0
        inputs = sum(self._product(unit, part) for unit in part.units) if part.gives_gradient else 0.0
        return inputs, sum(self._product(unit, part, of_weights=True) for unit in part.trained)

    def _product(self, unit: str, part: Part, *, of_weights: bool = False) -> float:
        rows, columns = whole_shape(unit, self.costs.shape)
        tokens, turns = self.micro_batch.tokens, 1.0
        if part.kind == "head":
            rows = self._vocabulary_rows
            tokens = tokens_of_a_chunk(self.micro_batch.tokens, rows)
            turns = self.micro_batch.tokens / tokens
        elif part.kind == "row":
            columns //= self._tensor_size
        else:
            rows //= self._tensor_size
        # A gradient is read, and written back with the product added to it.
        weight = 2 * self.costs.gradient_width if of_weights else self._size
        moved = self._size * tokens * (rows + columns) + weight * rows * columns
        return turns * self.device.product_seconds(2 * tokens * rows * columns, moved, of_weights=of_weights)

    def _attention(self, times: float) -> float:
        squares = self.micro_batch.sequences * self.micro_batch.seq_length**2
        flops = attention_flops(self.costs.shape) * squares / self._tensor_size
        return self.device.attention_seconds(times * flops)

    # --- passes over memory

    def _elementwise(self, part: Part, *, backward: bool) -> float:
        shape, elements = self.costs.shape, 0.0
        queries = shape.num_attention_heads * shape.kv_channels / self._tensor_size
        keys = shape.num_query_groups * shape.kv_channels / self._tensor_size
        hidden = shape.hidden_size / (self._tensor_size if splits_sequences(self.costs.parallel) else 1)
        if part.kind == "norm":
            elements = NORM[backward] * hidden
        elif part.kind == "row":
            elements = RESIDUAL[backward] * hidden
        elif part.kind == "rotation":
            elements = ROTATION[backward] * (queries + keys)
        elif part.kind == "attention":
            elements = ATTENTION_OUTPUT[backward] * queries
        elif part.kind == "swiglu":
            elements = SWIGLU[backward] * shape.ffn_hidden_size / self._tensor_size
        elif part.kind == "head":
            return self._logits(LOSS[backward], conversions=1)
        elif part.kind == "embedding":
            # Rows are copied; rows of the gradient are read and written.
            rows = self._size + (2 * self.costs.gradient_width if backward else self._size)
            return self.device.memory_seconds(rows * self.micro_batch.tokens * shape.hidden_size)
        return self.device.memory_seconds(self._size * self.micro_batch.tokens * elements)

    def _logits(self, passes: int, *, conversions: int) -> float:
        """Seconds of ``passes`` over fp32 logits, and with bf16 of conversions to or from them."""
        width = FP32_BYTES * passes + (FP32_BYTES + BF16_BYTES) * conversions * self.costs.bf16
        return self.device.memory_seconds(width * self.micro_batch.tokens * self._vocabulary_rows)

    # --- tensor-parallel ranks

    def _forward_collectives(self, part: Part) -> float:
        if part.kind in ("row", "embedding"):
            return self._sum_over_ranks
        return self._gather if part.kind in ("column", "head") else 0.0

    def _backward_collectives(self, part: Part, inputs: float, weights: float) -> float:
        """Exposed seconds: input gradients hide the gather, weight gradients the sum (``model/linear.py``)."""
        if part.kind in ("row", "embedding"):
            return self._gather * part.goes_backward
        if part.kind not in ("column", "head"):
            return 0.0
        needs_input = bool(part.trained) or (part.kind == "head" and part.forwards > 1)
        gather, summed = self._gather * needs_input, self._sum_over_ranks * part.gives_gradient
        if not self.device.sends_beside_compute:
            return gather + summed
        return max(0.0, gather - inputs) + max(0.0, summed - weights)

    @property
    def _gather(self) -> float:
        """Seconds of an all-gather along the sequence, where it is cut."""
        return self._ring if splits_sequences(self.costs.parallel) else 0.0

    @property
    def _sum_over_ranks(self) -> float:
        """Seconds of a reduce-scatter where the sequence is cut, else of an all-reduce."""
        return self._ring if splits_sequences(self.costs.parallel) else 2 * self._ring

    @property
    def _ring(self) -> float:
        bytes = self._size * self.micro_batch.tokens * self.costs.shape.hidden_size
        return self.device.ring_seconds(bytes, ranks=self._tensor_size, stride=1)

    @property
    def _size(self) -> int:
        """Bytes of an element of the model's data type."""
        return BF16_BYTES if self.costs.bf16 else FP32_BYTES

    @property
    def _tensor_size(self) -> int:
        return self.costs.parallel.tensor_model_parallel_size

    @property
    def _vocabulary_rows(self) -> int:
        return padded_vocab_size(self.costs.shape, self._tensor_size, self.costs.vocab_multiple) // self._tensor_size
