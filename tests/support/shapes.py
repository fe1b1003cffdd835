"""Tiny model shapes for tests of the pure method."""

from hft_megatron.config.model_shape import ModelShape


def tiny_shape(num_layers: int, *, heads: int = 2, groups: int = 1, tied: bool = False) -> ModelShape:
    """A model whose query and output matrices have ``heads / groups`` times the parameters of key and value."""
    return ModelShape(
        num_layers=num_layers,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=4,
        vocab_size=11,
        max_position_embeddings=16,
        tie_embeddings=tied,
    )
