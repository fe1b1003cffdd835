"""Token losses weighted by the model's own probabilities, and a divergence from the weights of the start.

With l_t the negative log-likelihood of a trained token, p_t = exp(-l_t), and no gradient through a weight:

- dft: p_t l_t (Wu et al. 2025, arXiv:2508.05629);
- eaft: (H_t / 3) l_t, H_t the entropy in nats of the 20 likeliest tokens, renormalised, of which ln 20 is the largest
  value there is (arXiv:2601.02151, with its exponent at 1);
- talr: max(p_t^(1 / tau), 0.01) l_t, tau the median over the examples of the global batch of their mean l_t
  (arXiv:2509.20758). Of an even number of examples the median is the lower of the two in the middle;
- beside any of them: beta KL(first weights || model) per trained token, over the whole vocabulary. ASFT is dft with
  beta 0.1.

Sums are divided by the trained tokens of the global batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.data.batches import StepBatch
from hft_megatron.methods.next_token import NEXT_TOKEN, forward, segment_lengths, segment_sums
from hft_megatron.methods.objectives.last_hidden import BASE_HIDDEN, model_of
from hft_megatron.model.head import Beside, ComparedModel, TokenValues
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.tracking import tracker as names
from hft_megatron.trainer.method import LossFunction, MicroBatch, Objective, forward_pass

LIKELIEST, LARGEST_ENTROPY = 20, 3.0
"""EAFT's number of tokens in the entropy, and its divisor."""
LEAST_WEIGHT = 0.01
"""TALR's lowest weight."""
TEMPERATURE = "temperature"
BASE_HEAD = "head of the first weights"
"""Keys in a micro-batch: TALR's tau, (); and this tensor rank's rows, (rows, h)."""
_MEANS = "mean losses of examples"
_SUMS = "sums over tokens"

Weigh = Callable[[TokenValues, MicroBatch], Tensor]
"""Values of tokens -> the weight of each, (b, s) fp32."""


def alike(values: TokenValues, micro_batch: MicroBatch) -> Tensor:
    """The same weight for every token."""
    return torch.ones_like(values.losses)


def by_probability(values: TokenValues, micro_batch: MicroBatch) -> Tensor:
    """DFT's weights."""
    return values.losses.neg().exp()


def by_entropy(values: TokenValues, micro_batch: MicroBatch) -> Tensor:
    """EAFT's weights."""
    assert values.entropies is not None
    return values.entropies / LARGEST_ENTROPY


def by_tempered_probability(values: TokenValues, micro_batch: MicroBatch) -> Tensor:
    """TALR's weights."""
    # Where every token is certain the temperature is 0.
    temperature = micro_batch[TEMPERATURE].clamp_min(torch.finfo(torch.float32).tiny)
    return (values.losses / -temperature).exp().clamp_min(LEAST_WEIGHT)


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """The loss over trained tokens."""

    weigh: Weigh
    entropy_of: int
    """See ``Beside``."""
    kl: float
    """Beta; 0: no divergence."""


def forward_step(
    batches: Iterator[MicroBatch], chunk: torch.nn.Module, *, rule: TokenRule
) -> tuple[Tensor | TokenValues, LossFunction]:
    """One forward pass of one micro-batch, as ``next_token.forward_step``."""
    micro_batch, compared = next(batches), None
    if BASE_HEAD in micro_batch:  # only on the last stage
        compared = ComparedModel(hidden=micro_batch[BASE_HIDDEN], weight=micro_batch[BASE_HEAD])
    with model_of(chunk).giving_beside_losses(Beside(entropy_of=rule.entropy_of, compared=compared)):
        output = forward(chunk, micro_batch)
    return output, partial(weighted_loss, micro_batch=micro_batch, rule=rule)


def weighted_loss(
    values: TokenValues, *, micro_batch: MicroBatch, rule: TokenRule
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values of tokens (b, s) -> the sum to minimise, the number of trained tokens (int), and sums for the log."""
    mask = micro_batch["loss_mask"].to(values.losses.device, non_blocking=True)
    with torch.no_grad():
        weights = rule.weigh(values, micro_batch) * mask
        plain = (values.losses * mask).sum()
    loss = (values.losses * weights).sum()
    divergence = torch.zeros_like(plain)
    if rule.kl > 0:
        assert values.divergences is not None
        divergence = (values.divergences * mask).sum()
        loss = loss + rule.kl * divergence
    tokens = mask.sum().to(torch.int)
    logged = torch.stack([loss.detach(), plain, divergence.detach(), tokens.float()])
    return loss, tokens, {_SUMS: logged}


def measure(
    reports: list[dict[str, Tensor]], group: dist.ProcessGroup, device: Any, *, rule: TokenRule
) -> dict[str, float]:
    """Means per trained token (nats) over all micro-batches of all data-parallel ranks: the objective, the plain loss
    and, where there is one, the divergence. Call on the last stage."""
    rows = [report[_SUMS].double() for report in reports]
    total = torch.stack(rows).sum(dim=0) if rows else torch.zeros(4, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    minimised, plain, divergence = (total[:-1] / total[-1]).tolist()
    compared = {names.KL_TO_BASE: divergence} if rule.kl > 0 else {}
    return {names.OBJECTIVE_LOSS: minimised, names.LOSS: plain, **compared}


def weighted_objective(weigh: Weigh, *, kl: float, entropy_of: int = 0) -> Objective:
    """Token losses weighted by ``weigh``, and ``kl`` times the divergence from the first weights."""
    rule = TokenRule(weigh=weigh, entropy_of=entropy_of, kl=kl)
    return Objective(
        loss_name=names.OBJECTIVE_LOSS,
        forward_step=partial(forward_step, rule=rule),
        measure=partial(measure, rule=rule),
        unweighted=NEXT_TOKEN,
    )


def ask_temperature(chunks: Sequence[LlamaModel], batch: StepBatch, placement: Placement) -> None:
    """Gives each micro-batch TALR's tau, on the last stage; one forward pass of the whole batch. Collective."""
    reports = forward_pass(_mean_loss_step, chunks, batch)
    if not reports:
        return
    temperature = median_over_ranks(torch.cat([report[_MEANS] for report in reports]), placement.groups.dp)
    for micro_batch in batch.micro_batches:
        micro_batch[TEMPERATURE] = temperature


def _mean_loss_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    micro_batch = next(batches)

    def report(token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = torch.ones((), dtype=torch.int, device=token_losses.device)
        return token_losses.sum(), tokens, {_MEANS: mean_losses(token_losses, micro_batch)}

    return forward(chunk, micro_batch), report


def mean_losses(token_losses: Tensor, micro_batch: MicroBatch) -> Tensor:
    """(b, s) -> the mean over each example's trained tokens, (examples or stretches of padding,) fp64; not a number
    where none is trained."""
    mask = micro_batch["loss_mask"].to(token_losses.device, torch.float64).flatten()
    lengths = segment_lengths(micro_batch)
    return segment_sums(token_losses.double().flatten() * mask, lengths) / segment_sums(mask, lengths)


def median_over_ranks(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The median, (), of the numbers that all ranks have, (n,) of any n, without NaN; fp32."""
    most = torch.tensor(len(mine), device=mine.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    padded = mine.new_full((int(most),), torch.nan)
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(everyone, padded, group=group)
    return torch.cat(everyone).nanmedian().float()
