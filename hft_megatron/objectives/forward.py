"""The forward pass that every objective shares, as megatron-core's pipeline schedules call it."""

import torch
from torch import Tensor

from hft_megatron.model.torch_attention import packed_seq_params
from hft_megatron.objectives.objective import MicroBatch


def forward(chunk: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """One model chunk's output: token losses (b, s) on the last stage, and hidden states (s, b, h) before it.

    ``micro_batch`` holds ``tokens`` and ``labels`` (b, s) int64, and ``cu_seqlens`` where the sequence is packed.
    """
    device = next(chunk.parameters()).device
    packed = packed_seq_params(micro_batch["cu_seqlens"], device) if "cu_seqlens" in micro_batch else None
    tokens, labels = (micro_batch[name].to(device, non_blocking=True) for name in ("tokens", "labels"))
    # Megatron-core asks for positions and doesn't read them: rotary ones follow from the packing alone.
    positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
    # No attention mask: it is causal in the attention itself, and padding stands on the right or is a segment.
    output: Tensor = chunk(tokens, positions, None, labels=labels, packed_seq_params=packed)
    return output
