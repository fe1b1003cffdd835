"""The table between megatron-core's parameter names and Hugging Face's, and the parameters that a rank holds.

Imports no torch, so that a plan's costs are known without building a model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from hft_megatron.config.adapters import ADAPTER_PARTS, adapted_unit, has_adapter
from hft_megatron.config.derived import layers_of_chunks, padded_vocab_size
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig

_LAYER_PARAMETERS: dict[str, tuple[str, int | None]] = {
    "input_layernorm": ("input_layernorm", None),
    "self_attention.linear_proj": ("self_attn.o_proj", 1),
    "self_attention.linear_qkv.q_proj": ("self_attn.q_proj", 0),
    "self_attention.linear_qkv.k_proj": ("self_attn.k_proj", 0),
    "self_attention.linear_qkv.v_proj": ("self_attn.v_proj", 0),
    "pre_mlp_layernorm": ("post_attention_layernorm", None),
    "mlp.linear_fc1.gate_proj": ("mlp.gate_proj", 0),
    "mlp.linear_fc1.up_proj": ("mlp.up_proj", 0),
    "mlp.linear_fc2": ("mlp.down_proj", 1),
}
"""megatron-core module of a layer -> (Hugging Face module, dimension cut over tensor ranks).

In the order in which megatron-core registers them, because gradient buffers are laid out by it.
"""

_OUTER_PARAMETERS: dict[str, tuple[str, int | None]] = {
    "embedding.word_embeddings": ("model.embed_tokens", 0),
    "decoder.final_layernorm": ("model.norm", None),
    "output_layer": ("lm_head", 0),
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+?)(?:\.adapter\.(lora_[AB]))?")


@dataclass(frozen=True, kw_only=True)
class ParameterName:
    """The name and place of one parameter of a chunk."""

    local_name: str
    """megatron-core's name in its chunk, without the ``module.`` of a wrapper; layers count from 0 in every chunk."""
    unit: str
    """Hugging Face module name, which is also the name of the HFT unit (tied: the embedding's on both stages)."""
    cut: int | None
    """Dimension cut over tensor ranks, None when every rank holds the whole."""
    is_vocab: bool
    """True if dimension 0 is the vocabulary, padded beyond Hugging Face's rows."""

    @property
    def is_adapter(self) -> bool:
        """True for one of an adapter's two matrices, which no Hugging Face folder of a model has."""
        return adapted_unit(self.unit) is not None


@dataclass(frozen=True, kw_only=True)
class ChunkPlace:
    """Place of one model chunk (a pipeline stage, or a virtual stage of it) in the model."""

    first_layer: int
    layers: int
    is_first: bool
    """True if it holds the embedding."""
    is_last: bool
    """True if it holds the final norm and the head."""


def name_of(local_name: str, *, first_layer: int, tie_embeddings: bool) -> ParameterName:
    """Looks a parameter up by megatron-core's name in a chunk whose layers begin at ``first_layer``.

    Raises KeyError for a name that the table does not know.
    """
    module = local_name.removesuffix(".weight")
    match = _LAYER.fullmatch(module)
    if match:
        hf_module, cut = _LAYER_PARAMETERS[match[2]]
        unit = f"model.layers.{first_layer + int(match[1])}.{hf_module}"
        if match[3]:
            # An A has the matrix's columns, and a B its rows: one of the two is cut as the matrix is.
            unit, cut = f"{unit}.{match[3]}", cut if cut == 1 - ADAPTER_PARTS.index(match[3]) else None
    else:
        unit, cut = _OUTER_PARAMETERS[module]
    is_vocab = unit in ("model.embed_tokens", "lm_head")
    if unit == "lm_head" and tie_embeddings:
        unit = "model.embed_tokens"
    return ParameterName(local_name=local_name, unit=unit, cut=cut, is_vocab=is_vocab)


def chunk_places(shape: ModelShape, parallel: ParallelConfig, pipeline_rank: int) -> tuple[ChunkPlace, ...]:
    """The chunks of a pipeline rank, bottom up."""
    chunks = layers_of_chunks(parallel, shape.num_layers)[pipeline_rank :: parallel.pipeline_model_parallel_size]
    return tuple(
        ChunkPlace(
            first_layer=layers.start,
            layers=len(layers),
            is_first=layers.start == 0,
            is_last=layers.stop == shape.num_layers,
        )
        for layers in chunks
    )


def chunk_parameters(place: ChunkPlace, shape: ModelShape) -> Iterator[ParameterName]:
    """The parameters of a chunk in the order of ``named_parameters()``; a chunk with both tied ends holds one."""
    modules = [
        f"decoder.layers.{layer}.{module}"
        for layer in range(place.layers)
        for matrix, (hf_module, _) in _LAYER_PARAMETERS.items()
        for module in (matrix, *(f"{matrix}.adapter.{part}" for part in _parts(hf_module, shape)))
    ]
    if place.is_first:
        modules.insert(0, "embedding.word_embeddings")
    if place.is_last:
        modules.append("decoder.final_layernorm")
        if not (place.is_first and shape.tie_embeddings):
            modules.append("output_layer")
    for module in modules:
        yield name_of(f"{module}.weight", first_layer=place.first_layer, tie_embeddings=shape.tie_embeddings)


def _parts(hf_module: str, shape: ModelShape) -> tuple[str, ...]:
    return ADAPTER_PARTS if has_adapter(hf_module, shape.adapters) else ()


def checkpoint_names(shape: ModelShape) -> dict[str, str]:
    """unit -> name of its weight in a checkpoint, which is megatron-core's in a model of a single chunk."""
    whole = ChunkPlace(first_layer=0, layers=shape.num_layers, is_first=True, is_last=True)
    return {name.unit: name.local_name for name in chunk_parameters(whole, shape)}


def whole_shape(unit: str, shape: ModelShape) -> tuple[int, ...]:
    """Shape of a unit's weight in Hugging Face's format: (out, in), or (hidden,) for norms; an adapter's as PEFT has
    it, (rank, in) and (out, rank)."""
    matrix = adapted_unit(unit)
    if matrix is not None:
        assert shape.adapters is not None, f"{unit} is of a model with adapters"
        rows, columns = whole_shape(matrix, shape)
        return (shape.adapters.rank, columns) if unit.endswith(ADAPTER_PARTS[0]) else (rows, shape.adapters.rank)
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    shapes = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    module = unit.rsplit(".", 1)[-1]
    if module in shapes:
        return shapes[module]
    assert unit == "model.norm" or module.endswith("layernorm"), f"{unit} is not a unit of a LLaMA"
    return (hidden,)


def local_elements(name: ParameterName, shape: ModelShape, *, tensor_size: int, vocab_multiple: int) -> int:
    """Elements of a parameter on one tensor rank, rows that pad the vocabulary included: the same on all of them.

    ``vocab_multiple`` is --make-vocab-size-divisible-by.
    """
    rows, *columns = whole_shape(name.unit, shape)
    if name.is_vocab:
        rows = padded_vocab_size(shape, tensor_size, vocab_multiple)
    whole = rows * prod(columns)
    return whole if name.cut is None else whole // tensor_size
