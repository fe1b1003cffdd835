"""Options of the model: a Hugging Face folder or a shape, and the rules about sizes that it can have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from hft_megatron.config.declared import flag
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


_ALLOWED_WITH_LOAD_HF = ("load_hf", "make_vocab_size_divisible_by")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Source of the model: a Hugging Face folder, or a shape with random weights."""

    load_hf: str | None = None
    """Hugging Face folder (config.json and safetensors) to start from. Not allowed together with --num-layers and the
    other options of a shape."""
    num_layers: Annotated[int, Ge(1)] | None = None
    """Transformer layers of a model with random weights."""
    hidden_size: Annotated[int, Ge(1)] | None = None
    """Width of the hidden states."""
    ffn_hidden_size: Annotated[int, Ge(1)] | None = None
    """Width of the feed-forward block; 8/3 of the hidden size, rounded down to a multiple of 64, when unset."""
    num_attention_heads: Annotated[int, Ge(1)] | None = None
    """Query heads of the attention."""
    num_query_groups: Annotated[int, Ge(1)] | None = None
    """Key and value heads; fewer than the query heads is grouped-query attention. As many as query heads when unset."""
    kv_channels: Annotated[int, Ge(1)] | None = None
    """Channels per attention head; hidden size / attention heads when unset."""
    vocab_size: Annotated[int, Ge(1)] | None = None
    """Rows of the embedding; the tokenizer's vocabulary when unset."""
    max_position_embeddings: Annotated[int, Ge(1)] | None = None
    """Longest sequence of the model, in tokens."""
    norm_epsilon: Annotated[float, Gt(0)] = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary position embedding (theta)."""
    untie_embeddings_and_output_weights: bool = False
    """Give the head weights of its own instead of the embedding's."""
    init_method_std: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of random weights."""
    make_vocab_size_divisible_by: Annotated[int, Ge(1)] = 1
    """Divisor of the padded vocabulary: it is padded to a multiple of this times the tensor-parallel size."""


def model_is_given_once(config: ModelConfig) -> None:
    """A model folder, or a shape; with both, one of them would be ignored in silence."""
    if config.load_hf is None:
        if all(getattr(config, field.name) == field.default for field in fields(config)):
            raise UserError(
                "No model is given: name a folder with --load-hf, or give a shape (--num-layers, --hidden-size and so "
                "on)."
            )
        return
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _ALLOWED_WITH_LOAD_HF and value != field.default:
            raise UserError(
                f"{flag(field.name)} {value} cannot be given with --load-hf, whose config.json sets it; leave it out."
            )


def heads_fit_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Query heads share key/value heads evenly, channels pair up, and transformers can read the export."""
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if heads % groups:
        raise UserError(
            f"--num-query-groups {groups} (num_key_value_heads of a model folder) does not divide "
            f"the model's {heads} attention heads."
        )
    if shape.hidden_size % heads:
        raise UserError(f"--num-attention-heads {heads} does not divide the model's hidden size {shape.hidden_size}.")
    if shape.kv_channels % 2:
        raise UserError(
            f"--kv-channels {shape.kv_channels} (head_dim of a model folder) is odd, but rotary embeddings "
            f"rotate pairs of channels; the nearest size that fits is {shape.kv_channels + 1}."
        )
