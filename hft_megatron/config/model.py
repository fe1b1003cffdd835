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
    """Where the model comes from: a Hugging Face folder, or a shape with random weights."""

    load_hf: str | None = None
    """Hugging Face folder (config.json and safetensors) to start from; the shape flags below are then not allowed."""
    num_layers: Annotated[int, Ge(1)] | None = None
    hidden_size: Annotated[int, Ge(1)] | None = None
    ffn_hidden_size: Annotated[int, Ge(1)] | None = None
    num_attention_heads: Annotated[int, Ge(1)] | None = None
    num_query_groups: Annotated[int, Ge(1)] | None = None
    kv_channels: Annotated[int, Ge(1)] | None = None
    vocab_size: Annotated[int, Ge(1)] | None = None
    """The tokenizer's when unset."""
    max_position_embeddings: Annotated[int, Ge(1)] | None = None
    norm_epsilon: Annotated[float, Gt(0)] = 1e-5
    rotary_base: Annotated[float, Gt(0)] = 10000.0
    untie_embeddings_and_output_weights: bool = False
    init_method_std: Annotated[float, Gt(0)] = 0.02
    make_vocab_size_divisible_by: Annotated[int, Ge(1)] = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""


def model_is_given_once(config: ModelConfig) -> None:
    """A model folder, or a shape; with both, one of them would be ignored in silence."""
    if config.load_hf is None:
        if all(getattr(config, field.name) == field.default for field in fields(config)):
            raise UserError("No model is given: name a folder with --load-hf, or a shape with --num-layers and so on.")
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
            f"--num-query-groups {groups} (a model folder's num_key_value_heads) does not divide "
            f"the model's {heads} attention heads."
        )
    if shape.hidden_size % heads:
        raise UserError(f"--num-attention-heads {heads} does not divide the model's hidden size {shape.hidden_size}.")
    if shape.kv_channels % 2:
        raise UserError(
            f"--kv-channels {shape.kv_channels} (a model folder's head_dim) is odd, and rotary embeddings "
            f"rotate pairs of channels; the nearest size that fits is {shape.kv_channels + 1}."
        )
