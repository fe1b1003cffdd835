"""Fine-tuning and pre-training: next-token cross-entropy over trained tokens, divided by their number in the global
batch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hft_megatron.model.torch_attention import packed_seq_params
from hft_megatron.objectives.objective import LossFunction, MicroBatch, Objective

LOSS_AND_TOKENS = "loss and tokens"


def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """One forward pass of one micro-batch, as megatron-core's schedules call it.

    ``tokens`` and ``labels`` (b, s) int64, ``loss_mask`` (b, s) fp32, and ``cu_seqlens`` where the sequence is packed.
    The output is the token losses (b, s) on the last stage and hidden states (s, b, h) before it.
    """
    device = next(chunk.parameters()).device
    micro_batch = next(batches)
    packed = packed_seq_params(micro_batch["cu_seqlens"], device) if "cu_seqlens" in micro_batch else None
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
    # Megatron-core asks for positions and doesn't read them: rotary ones follow from the packing alone.
    positions = torch.arange(batch["tokens"].size(1), device=device).expand_as(batch["tokens"])
    # No attention mask: it is causal in the attention itself, and padding stands on the right or is a segment.
    output: Tensor = chunk(batch["tokens"], positions, None, labels=batch["labels"], packed_seq_params=packed)
    return output, partial(masked_loss, loss_mask=batch["loss_mask"])


def masked_loss(token_losses: Tensor, *, loss_mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(b, s) losses and mask -> their sum, the number of trained tokens (int), and both for the log.

    With ``calculate_per_token_loss`` megatron-core divides all gradients once by the tokens of the global batch, so the
    result depends neither on micro-batch size nor on the number of ranks.
    """
    loss = (token_losses.float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {LOSS_AND_TOKENS: torch.stack([loss.detach(), tokens.float()])}


def mean_loss(reports: list[dict[str, Tensor]], group: torch.distributed.ProcessGroup, device: Any) -> float:
    """Mean loss per trained token (nats) over all micro-batches of all data-parallel ranks; call on the last stage.

    Sums in fp64: the order of ranks then doesn't show in the last digits of fp32 losses.
    """
    rows = [report[LOSS_AND_TOKENS].double() for report in reports]
    total = torch.stack(rows).sum(dim=0) if rows else torch.zeros(2, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=group)
    return float(total[0] / total[1])


NEXT_TOKEN = Objective(forward_step=forward_step, mean_loss=mean_loss)
