"""Fine-tuning and pre-training: next-token cross-entropy over trained tokens, divided by their number in the global
batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hft_megatron.model.torch_attention import packed_seq_params
from hft_megatron.tracking.tracker import LOSS
from hft_megatron.trainer.method import LossFunction, MicroBatch, Objective


def forward(chunk: torch.nn.Module, micro_batch: MicroBatch, embedded: Tensor | None = None) -> Any:
    """One model chunk's output: token losses (b, s) on the last stage, or the output asked for in their place, and
    hidden states (s, b, h) before it.

    ``micro_batch`` holds ``tokens`` and ``labels`` (b, s) int64, and ``cu_seqlens`` where the sequence is packed;
    ``embedded`` (s / tp or s, b, h) replaces the tokens' embeddings as input of the first stage's layers.
    """
    device = next(chunk.parameters()).device
    packed = packed_seq_params(micro_batch["cu_seqlens"], device) if "cu_seqlens" in micro_batch else None
    tokens, labels = (micro_batch[name].to(device, non_blocking=True) for name in ("tokens", "labels"))
    # megatron-core takes positions and doesn't read them: rotary ones follow from the packing alone.
    positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
    # No attention mask: it is causal in the attention itself, and padding is on the right or is a segment.
    given = {} if embedded is None else {"decoder_input": embedded}
    return chunk(tokens, positions, None, labels=labels, packed_seq_params=packed, **given)


def segment_lengths(micro_batch: MicroBatch) -> list[int]:
    """Positions of each example, or stretch of padding, in memory order: of the rows, or where a sequence is packed of
    the segments."""
    if "cu_seqlens" in micro_batch:
        lengths: list[int] = micro_batch["cu_seqlens"].diff().tolist()
        return lengths
    rows, length = micro_batch["loss_mask"].shape
    return [length] * rows


def segment_sums(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """(n,) -> (segments,), the sum of each. Uses slices: adding by index is not deterministic on CUDA."""
    return torch.stack([segment.sum() for segment in values.split(list(lengths))])


LOSS_AND_TOKENS = "loss and tokens"


def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """One forward pass of one micro-batch, as megatron-core's schedules call it.

    ``tokens`` and ``labels`` (b, s) int64, ``loss_mask`` (b, s) fp32, and ``cu_seqlens`` where the sequence is packed.
    The output is the token losses (b, s) on the last stage and hidden states (s, b, h) before it.
    """
    micro_batch = next(batches)
    return forward(chunk, micro_batch), partial(masked_loss, loss_mask=micro_batch["loss_mask"])


def masked_loss(token_losses: Tensor, *, loss_mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(b, s) losses and mask -> their sum, the number of trained tokens (int), and both for the log.

    With ``calculate_per_token_loss`` megatron-core divides all gradients once by the tokens of the global batch, so the
    result depends neither on micro-batch size nor on the number of ranks.
    """
    loss_mask = loss_mask.to(token_losses.device, non_blocking=True)
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


def measure(reports: list[dict[str, Tensor]], group: torch.distributed.ProcessGroup, device: Any) -> dict[str, float]:
    """The mean loss under its name in the log."""
    return {LOSS: mean_loss(reports, group, device)}


NEXT_TOKEN = Objective(loss_name=LOSS, forward_step=forward_step, measure=measure)
