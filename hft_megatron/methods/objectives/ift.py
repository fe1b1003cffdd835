"""Intuitive Fine-Tuning (IFT): examples mixed with the model's own predictions, and losses weighted by later ones.

Hua et al. 2024 (arXiv:2405.11870), as the authors' code has it (TsinghuaC3I/Intuitive-Fine-Tuning). Of an example with
the inputs x, where M are the positions whose next token is trained:

1. A pass without gradients gives the likeliest next token g_t after every x_1 .. x_t. Each trained token has g_{t-1}
   in x~, every other token, the first among them, itself.
2. Layers get (1 - lambda) E(x_t) + lambda E(x~_t). No gradient reaches the embedding E this way.
3. With l_t the loss of the next token in M, and 0 elsewhere, C_t is the sum over k >= t of gamma^(k-t) l_k in M, and 0
   elsewhere; distances count all positions.
4. The loss of the example is sum l_t C_t / sum C_t, and that of a batch the mean over its examples.
   With gamma 0 every C_t in M is 1: the loss of supervised fine-tuning on mixed inputs, averaged over examples.

In the authors' code gradients go through C as well. A token's weight in the gradient is then
(C_k + B_k - L G_k) / sum C with B_k the sum over t <= k in M of gamma^(k-t) l_t, G_k that of gamma^(k-t), and L the
loss of the example: it can be negative, and is so first for the last tokens, which are then trained to be less likely.
Detached, weights are C_k / sum C. The paper's equation 21 is another loss, without the division, whose weights grow
with the position; it is not implemented.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hft_megatron.config.objectives import ObjectivesConfig
from hft_megatron.data.batches import StepBatch
from hft_megatron.methods.next_token import NEXT_TOKEN, forward, segment_lengths, segment_sums
from hft_megatron.methods.objectives.last_hidden import look_at_hidden_states, model_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.readout import Readout
from hft_megatron.parallel.groups import Placement
from hft_megatron.tracking import tracker as names
from hft_megatron.trainer.method import LossFunction, MicroBatch, Objective

PREDICTED = "tokens with predictions"
"""Key in a micro-batch: x~, (b, s) int64."""
_SUMS = "sums over examples and tokens"


def ask_predictions(chunks: Sequence[LlamaModel], batch: StepBatch, placement: Placement) -> None:
    """Gives each micro-batch its x~, on every stage: the first one needs the last one's result. Collective."""
    likeliest = look_at_hidden_states(_likeliest, chunks, batch)
    if not likeliest:
        shape = (len(batch.micro_batches), batch.seq_length, batch.sequences)
        found = torch.empty(shape, dtype=torch.int64, device=placement.device)
    else:
        found = torch.stack(likeliest)
    group = placement.groups.pp
    if group.size() > 1:
        dist.broadcast(found, src=dist.get_global_rank(group, group.size() - 1), group=group)
    for micro_batch, of_it in zip(batch.micro_batches, found, strict=True):
        micro_batch[PREDICTED] = with_predictions(of_it.t(), micro_batch)


def _likeliest(hidden: Tensor, model: LlamaModel) -> Tensor:
    """(s / tp or s, b, h) -> the likeliest next token of each position, (s, b)."""
    readout = Readout(model)
    return readout.likeliest(readout.whole(hidden)).view(-1, hidden.size(1))


def with_predictions(likeliest: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The tokens (b, s) with the prediction in place of each trained one; ``likeliest`` (b, s) are those of the next
    tokens, -1 where there is none."""
    tokens, mask = (micro_batch[name].to(likeliest.device) for name in ("tokens", "loss_mask"))
    replaced = mask.roll(1, dims=1) > 0
    starts = torch.tensor(segment_lengths(micro_batch)).cumsum(dim=0)[:-1].to(likeliest.device)
    is_start = torch.zeros(tokens.numel(), dtype=torch.bool, device=likeliest.device)
    is_start[0] = True
    is_start[starts] = True
    predicted = likeliest.roll(1, dims=1)
    return predicted.where(replaced & ~is_start.view_as(tokens) & (predicted >= 0), tokens)


def forward_step(
    batches: Iterator[MicroBatch], chunk: torch.nn.Module, *, options: ObjectivesConfig
) -> tuple[Tensor, LossFunction]:
    """One forward pass of one micro-batch on mixed inputs, as ``next_token.forward_step``."""
    micro_batch, model, embedded = next(batches), model_of(chunk), None
    if model.pre_process:
        predicted = micro_batch[PREDICTED]
        tokens = micro_batch["tokens"].to(predicted.device)
        embedded = model.mixed_embeddings(tokens, predicted, options.ift_lambda)
    output = forward(chunk, micro_batch, embedded)
    return output, partial(intuitive_loss, micro_batch=micro_batch, options=options)


def intuitive_loss(
    token_losses: Tensor, *, micro_batch: MicroBatch, options: ObjectivesConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(b, s) token losses -> the sum of the examples' losses, their number (int), and sums for the log."""
    lengths = segment_lengths(micro_batch)
    mask = micro_batch["loss_mask"].to(token_losses.device, torch.float64).flatten()
    losses = token_losses.double().flatten() * mask
    # At gamma 0 the authors' weights are 1, whereas the sums would be the losses.
    following = mask if options.ift_gamma == 0 else discounted_sums(losses, lengths, options.ift_gamma) * mask
    if options.ift_weights == "detached":
        following = following.detach()
    products, sums, tokens = (segment_sums(values, lengths) for values in (losses * following, following, mask))
    # Where all tokens are certain both sums are 0, and so is the loss.
    loss = (products / sums.clamp_min(torch.finfo(torch.float64).tiny)).sum()
    examples = (tokens > 0).sum()
    logged = torch.stack([loss, losses.sum(), examples, tokens.sum()]).detach()
    return loss.to(token_losses.dtype), examples.to(torch.int), {_SUMS: logged}


def discounted_sums(values: Tensor, lengths: Sequence[int], gamma: float) -> Tensor:
    """(n,) -> for every position the sum of gamma^distance x value from it to the end of its segment.

    Needs one step per doubling up to the longest of the ``lengths``.
    """
    counts = torch.tensor(lengths, device=values.device)
    segments = torch.arange(len(lengths), device=values.device).repeat_interleave(counts, output_size=len(values))
    reach = 1
    while reach < max(lengths):  # ``values`` have the sums over ``reach`` positions
        is_same = segments[reach:] == segments[:-reach]
        ahead = values[reach:].where(is_same, 0.0)
        values = values + gamma**reach * F.pad(ahead, (0, reach))
        reach *= 2
    return values


def measure(reports: list[dict[str, Tensor]], group: dist.ProcessGroup, device: Any) -> dict[str, float]:
    """The mean loss of an example, and the plain loss per trained token (nats) on the mixed inputs, over all
    micro-batches of all data-parallel ranks; call on the last stage."""
    rows = [report[_SUMS] for report in reports]
    total = torch.stack(rows).sum(dim=0) if rows else torch.zeros(4, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    minimised, plain = (total[:2] / total[2:]).tolist()
    return {names.OBJECTIVE_LOSS: minimised, names.LOSS: plain}


def intuitive_objective(options: ObjectivesConfig) -> Objective:
    """The objective that the options of a run describe; ``ask_predictions`` runs before each of its steps."""
    return Objective(
        loss_name=names.OBJECTIVE_LOSS,
        forward_step=partial(forward_step, options=options),
        measure=measure,
        unweighted=NEXT_TOKEN,
    )
