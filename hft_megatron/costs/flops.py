"""Floating-point operations of a training step by formula: no torch, no model, no ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from math import prod

from hft_megatron.config.adapters import ADAPTER_PARTS
from hft_megatron.config.derived import padded_vocab_size, tokens_of_a_chunk
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.parts import MATRICES, Part, parts_of
from hft_megatron.hft.units import LM_HEAD_NAME
from hft_megatron.model.parameter_names import whole_shape

FORMULA = (
    "model FLOPs = 6 x tokens x matrix parameters (lm_head included, embedding lookup not) "
    "+ 6 x layers x heads x head size x sum of squared example lengths (causal: half of the scores); "
    "actual FLOPs = model FLOPs - skipped weight and input gradients + recomputed forward products"
)
"""The rule in words, as every result file has it. Padding counts neither as tokens nor in a length."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of all ranks together: per token in the matrices, and per squared example length in attention."""

    per_token: int
    per_squared_length: int

    def of(self, tokens: int, squared_lengths: int) -> int:
        """FLOPs of a step with this number of real tokens and this sum of squared example lengths."""
        return self.per_token * tokens + self.per_squared_length * squared_lengths


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of a step, counted in two ways."""

    model: Flops
    """FLOPs of full fine-tuning without recomputation, whatever trains: comparable with published figures."""
    actual: Flops
    """FLOPs that the engine computes under the plan."""


@dataclass(frozen=True, kw_only=True)
class ExtraWork:
    """Work of a step beyond its own passes, on every token of its batch."""

    forward_passes: int = 0
    """Forward passes of a model without adapters, to its logits."""
    adapted_passes: int = 0
    """Forward passes with the adapters of the trained model, to its logits."""
    head_products: int = 0
    """Products of the head alone."""

    def __add__(self, other: "ExtraWork") -> "ExtraWork":
        return ExtraWork(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


NO_EXTRA_WORK = ExtraWork()


def step_flops(
    shape: ModelShape,
    parallel: ParallelConfig,
    training: TrainingConfig,
    trains: Callable[[str], bool],
    *,
    micro_batch_tokens: int,
    vocab_multiple: int = 1,
    extra: ExtraWork = NO_EXTRA_WORK,
) -> StepFlops:
    """FLOPs of training the units for which ``trains`` is true.

    ``micro_batch_tokens`` are the positions of a micro-batch, padding included. Where there are many, the head's
    product is recomputed in the backward pass (``model/loss_chunks.py``).

    Per token a matrix costs 2 FLOPs per parameter forward, 2 for the gradient of its input and 2 for its own. Per layer
    the causal scores and their product with the values cost 2 x heads x head size x length^2 forward (every query meets
    on average half of the keys) and twice that backward, as Megatron-LM and newer NeMo count. Flash kernels recompute
    the scores in the backward pass, which by convention isn't counted.
    ``extra`` is added: the work of a reference in memory, or of passes through the model before its own.
    """
    head = head_forwards(
        shape,
        parallel.tensor_model_parallel_size,
        micro_batch_tokens=micro_batch_tokens,
        vocab_multiple=vocab_multiple,
    )
    parts = parts_of(shape, parallel, training, trains, head_forwards=head)
    forward, of_adapters, actual = _flops_of(parts, shape, parallel.tensor_model_parallel_size)
    passes = extra.forward_passes + extra.adapted_passes
    added = passes * forward.per_token + extra.adapted_passes * of_adapters
    added += extra.head_products * product_flops(LM_HEAD_NAME, shape)
    return StepFlops(
        model=Flops(per_token=3 * forward.per_token, per_squared_length=3 * forward.per_squared_length),
        actual=Flops(
            per_token=actual.per_token + added,
            per_squared_length=actual.per_squared_length + passes * forward.per_squared_length,
        ),
    )


def product_flops(unit: str, shape: ModelShape) -> int:
    """FLOPs per token of one product with the unit's matrix, over all tensor-parallel ranks."""
    return 2 * prod(whole_shape(unit, shape))


def attention_flops(shape: ModelShape) -> int:
    """FLOPs per squared length of one layer's forward pass: half of QK^T and half of the product with V."""
    return 2 * shape.num_attention_heads * shape.kv_channels


def head_forwards(shape: ModelShape, tensor_size: int, *, micro_batch_tokens: int, vocab_multiple: int = 1) -> int:
    """Number of forward products of the head: a second one where its logits were dropped."""
    rows = padded_vocab_size(shape, tensor_size, vocab_multiple) // tensor_size
    return 1 if tokens_of_a_chunk(micro_batch_tokens, rows) == micro_batch_tokens else 2


def _flops_of(parts: Iterable[Part], shape: ModelShape, tensor_size: int) -> tuple[Flops, int, Flops]:
    """FLOPs of one forward pass through the parts without adapters, those that adapters add to it per token, and FLOPs
    of all passes of a step."""
    once = of_adapters = again = attention_once = attention_again = 0
    for part in parts:
        if part.kind == "attention":
            attention_once += attention_flops(shape)
            attention_again += attention_flops(shape) * (part.forwards + 2 * part.goes_backward)
        elif part.kind in MATRICES:
            for unit in part.units:
                product = product_flops(unit, shape)
                once += product
                again += product * (part.forwards + part.gives_gradient + (unit in part.trained))
            for unit in part.adapters:
                is_first = unit.endswith(ADAPTER_PARTS[0])
                # The one of the two that is not cut is used by every tensor rank.
                ranks = 1 if is_first == (part.kind == "row") else tensor_size
                product = ranks * product_flops(unit, shape)
                of_adapters += product
                # What comes out of an A that trains needs a gradient.
                again += product * (part.forwards + 1 + (part.gives_gradient or not is_first))
    return (
        Flops(per_token=once, per_squared_length=attention_once),
        of_adapters,
        Flops(per_token=again, per_squared_length=attention_again),
    )
