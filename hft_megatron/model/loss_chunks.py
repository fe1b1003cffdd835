"""Of how many tokens the logits are in memory at one time. Imports no torch: costs are counted by the same rule."""

WHOLE_BYTES = 2**30
"""Of fp32 logits on a rank: up to this all tokens are one chunk."""
CHUNK_BYTES = 2**29
"""Of a chunk's fp32 logits, at most, where there are several."""
_FP32_BYTES = 4


def tokens_of_a_chunk(tokens: int, rows: int) -> int:
    """The tokens whose logits over ``rows`` of the vocabulary are in memory at once: all of them, or a chunk."""
    row_bytes = rows * _FP32_BYTES
    return tokens if tokens * row_bytes <= WHOLE_BYTES else max(1, CHUNK_BYTES // row_bytes)
