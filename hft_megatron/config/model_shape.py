"""The shape of a LLaMA model, from a Hugging Face ``config.json`` or from flags. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama-3's frequency scaling of rotary embeddings (``rope_type: llama3`` in config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that fixes a LLaMA's parameters and its forward pass."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; fewer than ``num_attention_heads`` is grouped-query attention."""
    kv_channels: int
    """Channels of one head (Hugging Face's ``head_dim``)."""
    vocab_size: int
    """Rows of the embedding as Hugging Face has them, before padding for tensor parallelism."""
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_embeddings: bool = False
    init_method_std: float = 0.02
