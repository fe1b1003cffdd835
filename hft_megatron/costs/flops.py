"""Floating-point operations of a training step by formula: no torch, no model, no ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from hft_megatron.config.adapters import ADAPTER_PARTS, has_adapter
from hft_megatron.config.derived import layers_of_chunks, padded_vocab_size, tokens_of_a_chunk
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.hft.units import (
    ATTENTION_IN,
    ATTENTION_OUT,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    LM_HEAD_NAME,
    MLP_IN,
    MLP_OUT,
    NAMES_IN_LAYER,
)
from hft_megatron.model.parameter_names import whole_shape

FORMULA = (
    "model FLOPs = 6 x tokens x matrix parameters (lm_head included, embedding lookup not) "
    "+ 6 x layers x heads x head size x sum of squared example lengths (causal: half of the scores); "
    "actual FLOPs = model FLOPs - skipped weight and input gradients + recomputed forward products"
)
"""The rule in words, as every result file has it. Padding is in neither: neither as tokens nor in a length."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of all ranks together: what a token costs in the matrices, and an example's squared length in attention."""

    per_token: int
    per_squared_length: int

    def of(self, tokens: int, squared_lengths: int) -> int:
        """Those of a step with so many real tokens, and the sum of the squared lengths of its examples."""
        return self.per_token * tokens + self.per_squared_length * squared_lengths


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """By the two ways of counting."""

    model: Flops
    """What full fine-tuning needs without recomputation, whatever trains: comparable with everybody's figures."""
    actual: Flops
    """What the engine does under the plan."""


def step_flops(
    shape: ModelShape,
    parallel: ParallelConfig,
    training: TrainingConfig,
    trains: Callable[[str], bool],
    *,
    micro_batch_tokens: int,
    vocab_multiple: int = 1,
    reference_forward: bool = False,
) -> StepFlops:
    """FLOPs of training the units for which ``trains`` is true.

    ``micro_batch_tokens`` are the positions of a micro-batch, with its padding: of many the head's product is made
    again in the backward pass (``model/loss_chunks.py``).

    Per token a matrix costs 2 FLOPs per parameter forward, 2 for the gradient of its input and 2 for its own. Per layer
    the causal scores and their product with the values cost 2 x heads x head size x length^2 forward (every query meets
    on average half of the keys) and twice that backward, as Megatron-LM and newer NeMo count. Flash kernels make
    the scores again in the backward pass, which by custom isn't counted.
    ``reference_forward`` adds the second forward pass of a preference run whose reference is in memory.
    """
    tensor_size = parallel.tensor_model_parallel_size
    rows = padded_vocab_size(shape, tensor_size, vocab_multiple) // tensor_size
    head_forwards = 1 if tokens_of_a_chunk(micro_batch_tokens, rows) == micro_batch_tokens else 2
    count = _Count(shape=shape, parallel=parallel, training=training, trains=trains, head_forwards=head_forwards)
    actual = count.run()
    forward = count.forward()
    return StepFlops(
        model=Flops(per_token=3 * forward.per_token, per_squared_length=3 * forward.per_squared_length),
        actual=Flops(
            per_token=actual.per_token + reference_forward * forward.per_token,
            per_squared_length=actual.per_squared_length + reference_forward * forward.per_squared_length,
        ),
    )


@dataclass(kw_only=True)
class _Count:
    """Walks up the model as the engine's forward pass does, and notes which products its backward pass makes."""

    shape: ModelShape
    parallel: ParallelConfig
    training: TrainingConfig
    trains: Callable[[str], bool]
    head_forwards: int
    """How often the head's forward product is made."""
    flows: bool = False
    """Whether the hidden state at this point needs a gradient."""
    per_token: int = 0
    per_squared_length: int = 0

    def forward(self) -> Flops:
        """One forward pass."""
        layer = [f"model.layers.0.{module}" for module in (*ATTENTION_IN, ATTENTION_OUT, *MLP_IN, MLP_OUT)]
        matrices = self.shape.num_layers * sum(map(self._product, layer)) + self._product(LM_HEAD_NAME)
        return Flops(per_token=matrices, per_squared_length=self.shape.num_layers * self._attention)

    def run(self) -> Flops:
        """All passes of a step."""
        self.flows = self.trains(EMBEDDING_NAME) or self._recomputed_layers_train()
        for layers in layers_of_chunks(self.parallel, self.shape.num_layers):
            self.flows |= (
                layers.start > 0
            )  # What a stage receives always needs a gradient: megatron-core sends it back.
            for layer_of_chunk, layer in enumerate(layers):
                self._layer(layer, is_recomputed=self._is_recomputed(layer_of_chunk) and self.flows)
        self.flows |= self.trains(FINAL_NORM_NAME)
        head = EMBEDDING_NAME if self.shape.tie_embeddings else LM_HEAD_NAME
        self._product_with(LM_HEAD_NAME, self.trains(head), self.head_forwards)
        return Flops(per_token=self.per_token, per_squared_length=self.per_squared_length)

    def _layer(self, layer: int, *, is_recomputed: bool) -> None:
        forwards = 2 if is_recomputed else 1

        def unit(module: str) -> str:
            return f"model.layers.{layer}.{module}"

        self.flows |= self.trains(unit("input_layernorm"))
        self._group([unit(module) for module in ATTENTION_IN], forwards)
        attention_again = is_recomputed or (self.training.recompute_granularity == "selective" and self.flows)
        self.per_squared_length += self._attention * (1 + attention_again + 2 * self.flows)
        self._group([unit(ATTENTION_OUT)], forwards)
        self.flows |= self.trains(unit("post_attention_layernorm"))
        self._group([unit(module) for module in MLP_IN], forwards)
        self._group([unit(MLP_OUT)], forwards)

    def _group(self, units: list[str], forwards: int) -> None:
        """Matrices that share an input, or one: its gradient is made by all of them or by none."""
        adapters = [f"{unit}.{part}" for unit in units for part in self._parts(unit)]
        for unit in units:
            self._product_with(unit, self.trains(unit), forwards)
            self._adapter_with(unit, forwards)
        self.flows |= any(map(self.trains, [*units, *adapters]))

    def _adapter_with(self, unit: str, forwards: int) -> None:
        """The products of a matrix's adapter; the one of the two that is not cut is used by every tensor rank."""
        is_row_parallel = unit.endswith((ATTENTION_OUT, MLP_OUT))
        below = self.flows
        for part in self._parts(unit):
            name, is_first = f"{unit}.{part}", part == ADAPTER_PARTS[0]
            ranks = 1 if is_first == is_row_parallel else self.parallel.tensor_model_parallel_size
            self.per_token += ranks * self._product(name) * (forwards + below + self.trains(name))
            below |= self.trains(name)

    def _parts(self, unit: str) -> tuple[str, ...]:
        return ADAPTER_PARTS if has_adapter(unit, self.shape.adapters) else ()

    def _product_with(self, unit: str, is_trained: bool, forwards: int) -> None:
        """A matrix's products: forward, for the gradient of its input, and for its own."""
        self.per_token += self._product(unit) * (forwards + self.flows + is_trained)

    def _is_recomputed(self, layer_of_chunk: int) -> bool:
        """Whether a layer's whole forward pass is made again: the first ones of every chunk under ``block``."""
        training = self.training
        if training.recompute_granularity != "full":
            return False
        assert training.recompute_num_layers is not None, "validate() asks for it"
        return training.recompute_method == "uniform" or layer_of_chunk < training.recompute_num_layers

    def _recomputed_layers_train(self) -> bool:
        """Then the lowest hidden state needs a gradient even above a frozen embedding (``LlamaModel``)."""
        lowest, *_ = layers_of_chunks(self.parallel, self.shape.num_layers)
        layers = [layer for layer in lowest if self._is_recomputed(layer)]
        units = [f"model.layers.{layer}.{module}" for layer in layers for module in NAMES_IN_LAYER]
        units += [f"{unit}.{part}" for unit in units for part in self._parts(unit)]
        return any(map(self.trains, units))

    def _product(self, unit: str) -> int:
        """FLOPs per token of one product with the unit's matrix."""
        return 2 * prod(whole_shape(unit, self.shape))

    @property
    def _attention(self) -> int:
        """FLOPs per squared length of one layer's forward pass: half of QK^T and half of the product with V."""
        return 2 * self.shape.num_attention_heads * self.shape.kv_channels
