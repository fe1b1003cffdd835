"""The one table between megatron-core's parameter names and Hugging Face's, and how each is cut over tensor ranks."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.groups import Placement

_LAYER_PARAMETERS: dict[str, tuple[str, int | None]] = {
    "input_layernorm": ("input_layernorm", None),
    "self_attention.linear_qkv.q_proj": ("self_attn.q_proj", 0),
    "self_attention.linear_qkv.k_proj": ("self_attn.k_proj", 0),
    "self_attention.linear_qkv.v_proj": ("self_attn.v_proj", 0),
    "self_attention.linear_proj": ("self_attn.o_proj", 1),
    "pre_mlp_layernorm": ("post_attention_layernorm", None),
    "mlp.linear_fc1.gate_proj": ("mlp.gate_proj", 0),
    "mlp.linear_fc1.up_proj": ("mlp.up_proj", 0),
    "mlp.linear_fc2": ("mlp.down_proj", 1),
}
"""megatron-core module of a layer -> (Hugging Face module, dimension cut over tensor ranks)."""

_OUTER_PARAMETERS: dict[str, tuple[str, int | None]] = {
    "embedding.word_embeddings": ("model.embed_tokens", 0),
    "decoder.final_layernorm": ("model.norm", None),
    "output_layer": ("lm_head", 0),
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class ParameterSlot:
    """One local parameter and what it is a part of."""

    parameter: torch.nn.Parameter
    local_name: str
    """megatron-core's name in this chunk, without the ``module.`` of a wrapper."""
    unit: str
    """Hugging Face module name, which is also the name of the HFT unit (tied: the embedding's on both stages)."""
    cut: int | None
    """Dimension cut over tensor ranks, None when every rank holds the whole."""
    is_vocab: bool
    """Whether dimension 0 is the vocabulary, padded beyond Hugging Face's rows."""

    @property
    def hf_name(self) -> str:
        return f"{self.unit}.weight"


def parameter_slots(chunks: Sequence[LlamaModel]) -> Iterator[ParameterSlot]:
    """Every parameter of this rank, in the chunks' order. Asserts that the table knows each of them."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            module = name.removesuffix(".weight")
            match = _LAYER.fullmatch(module)
            if match:
                # The index counts within the chunk; a layer knows its place in the whole model (from 1).
                layer = chunk.decoder.layers[int(match[1])].layer_number - 1
                hf_module, cut = _LAYER_PARAMETERS[match[2]]
                unit = f"model.layers.{layer}.{hf_module}"
            else:
                unit, cut = _OUTER_PARAMETERS[module]
            is_vocab = unit in ("model.embed_tokens", "lm_head")
            if unit == "lm_head" and chunk.shape.tie_embeddings:
                unit = "model.embed_tokens"
            yield ParameterSlot(parameter=parameter, local_name=name, unit=unit, cut=cut, is_vocab=is_vocab)


def whole_shape(unit: str, shape: ModelShape) -> tuple[int, ...]:
    """Shape of a unit's weight in Hugging Face's format: (out, in), or (hidden,) for norms."""
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


def local_range(slot: ParameterSlot, whole: int, placement: Placement) -> tuple[int, int]:
    """(start, length) of this tensor rank's part of ``whole`` entries; what lies beyond pads the vocabulary."""
    assert slot.cut is not None
    size = slot.parameter.size(slot.cut)
    start = min(placement.tensor_rank * size, whole)
    real = min(size, whole - start)
    assert real == size or slot.is_vocab, "only the vocabulary is padded"
    return start, real


def local_slice(whole: torch.Tensor, slot: ParameterSlot, placement: Placement) -> torch.Tensor:
    """This tensor rank's part of a whole Hugging Face tensor; rows that pad the vocabulary come back zero."""
    if slot.cut is None:
        return whole
    start, real = local_range(slot, whole.size(slot.cut), placement)
    part = whole.narrow(slot.cut, start, real)
    missing = slot.parameter.size(slot.cut) - real
    return torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing else part
