"""Units, which are trained or frozen: one per Hugging Face weight, in an order that never depends on a layout.

Pure: no torch, no ranks. Everything the method decides, it decides over these units.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hft_megatron.config.adapters import ADAPTER_PARTS, adapted_unit, has_adapter
from hft_megatron.config.model_shape import ModelShape

Category = Literal["attention", "feed_forward", "norm", "adapter", "embedding", "final_norm", "lm_head"]

CATEGORIES: tuple[Category, ...] = (
    "attention",
    "feed_forward",
    "norm",
    "adapter",
    "embedding",
    "final_norm",
    "lm_head",
)
LAYER_CATEGORIES: tuple[Category, ...] = ("attention", "feed_forward", "norm")
"""The categories inside the transformer layers, which the method halves (Hui et al., arXiv 2404.18466)."""
MATRIX_CATEGORIES: tuple[Category, ...] = ("attention", "feed_forward")
"""The categories inside the layers whose units are matrices."""

EMBEDDING_NAME = "model.embed_tokens"
FINAL_NORM_NAME = "model.norm"
LM_HEAD_NAME = "lm_head"

ATTENTION_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Names in a layer of the matrices that read the attention's input."""
ATTENTION_OUT = "self_attn.o_proj"
MLP_IN = ("mlp.gate_proj", "mlp.up_proj")
"""Names in a layer of the matrices that read the feed-forward block's input."""
MLP_OUT = "mlp.down_proj"
NAMES_IN_LAYER = ("input_layernorm", *ATTENTION_IN, ATTENTION_OUT, "post_attention_layernorm", *MLP_IN, MLP_OUT)
"""All of a layer's units but adapters, in the order in which a forward pass meets them."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest part that is trained or frozen as a whole: one weight matrix, or one norm."""

    name: str
    """Hugging Face's module name, such as ``model.layers.3.self_attn.q_proj``."""
    layer: int | None
    """Index of the transformer layer; None outside the layers."""
    category: Category
    parameters: int
    """Elements of the whole weight as Hugging Face has it: not sharded, vocabulary not padded."""


def units_of(shape: ModelShape) -> tuple[Unit, ...]:
    """All units of a model in canonical order: embedding, layers from the bottom up, final norm, lm_head.

    With tied embeddings the embedding and the head are one weight, and so one unit, named after the embedding. The two
    units of an adapter follow that of its matrix.
    """
    vocabulary_parameters = shape.vocab_size * shape.hidden_size
    units = [Unit(name=EMBEDDING_NAME, layer=None, category="embedding", parameters=vocabulary_parameters)]
    for layer in range(shape.num_layers):
        units.extend(_units_of_layer(shape, layer))
    units.append(Unit(name=FINAL_NORM_NAME, layer=None, category="final_norm", parameters=shape.hidden_size))
    if not shape.tie_embeddings:
        units.append(Unit(name=LM_HEAD_NAME, layer=None, category="lm_head", parameters=vocabulary_parameters))
    return tuple(units)


def forward_position(unit: str) -> int:
    """A unit's place in the order in which a forward pass meets the units, among those of its model."""
    per_layer = len(NAMES_IN_LAYER)
    if unit == EMBEDDING_NAME:
        return -1
    if unit in (FINAL_NORM_NAME, LM_HEAD_NAME):
        return sys.maxsize - (unit == FINAL_NORM_NAME)
    _, _, layer, name = (adapted_unit(unit) or unit).split(".", 3)
    return int(layer) * per_layer + NAMES_IN_LAYER.index(name)


def _units_of_layer(shape: ModelShape, layer: int) -> Iterator[Unit]:
    """The nine units of one layer, and those of adapters; head_dim x heads need not be the hidden size, and k and v
    shrink with GQA."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, key_value = (heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups))
    matrices: tuple[tuple[str, Category, int, int], ...] = (
        ("self_attn.q_proj", "attention", query, hidden),
        ("self_attn.k_proj", "attention", key_value, hidden),
        ("self_attn.v_proj", "attention", key_value, hidden),
        ("self_attn.o_proj", "attention", hidden, query),
        ("mlp.gate_proj", "feed_forward", ffn, hidden),
        ("mlp.up_proj", "feed_forward", ffn, hidden),
        ("mlp.down_proj", "feed_forward", hidden, ffn),
    )
    for suffix, category, rows, columns in matrices:
        name = f"model.layers.{layer}.{suffix}"
        yield Unit(name=name, layer=layer, category=category, parameters=rows * columns)
        if shape.adapters is not None and has_adapter(name, shape.adapters):
            for part, side in zip(ADAPTER_PARTS, (columns, rows), strict=True):
                parameters = shape.adapters.rank * side
                yield Unit(name=f"{name}.{part}", layer=layer, category="adapter", parameters=parameters)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Unit(name=f"model.layers.{layer}.{norm}", layer=layer, category="norm", parameters=hidden)
