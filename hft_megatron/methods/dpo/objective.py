"""Direct preference optimization: pairs of answers, of which the first is preferred, against a reference model.

Rafailov et al. 2023 (arXiv:2305.18290); ``ipo`` is Azar et al. 2023 (arXiv:2310.12036), eq. 17; ``hinge`` is SLiC's
(Zhao et al. 2023, arXiv:2305.10425) as a function of the same log-ratios; label smoothing is Mitchell's conservative
DPO (2023). Log-probabilities are sums of token losses, which the vocabulary-parallel cross-entropy gives without
gathered logits. They are summed in fp64, so that neither padding nor the place in a pack shows in them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hft_megatron.config.derived import averages_log_probs
from hft_megatron.config.dpo import DpoConfig, PreferenceLoss
from hft_megatron.methods.next_token import forward, segment_lengths, segment_sums
from hft_megatron.tracking import tracker as names
from hft_megatron.trainer.method import LossFunction, MicroBatch, Objective

LOG_PROBS = "log probabilities"
SUMS = "sums over pairs"
_SUMMED = (
    names.PREFERENCE_LOSS,
    names.CHOSEN_REWARD,
    names.REJECTED_REWARD,
    names.REWARD_ACCURACY,
    names.CHOSEN_LOG_PROBS,
    names.REJECTED_LOG_PROBS,
    names.KL,
)


@dataclass(frozen=True, kw_only=True)
class PreferenceRule:
    """The loss over pairs."""

    loss: PreferenceLoss = "sigmoid"
    beta: float = 0.1
    """Strength of the tie to the reference; the tau of IPO."""
    label_smoothing: float = 0.0
    """Probability that the two answers of a pair have been confused; for the sigmoid loss alone."""
    average_log_probs: bool = False
    """Divide every answer's log-probability by its number of tokens."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean token loss, which is added (Pang et al. 2024, arXiv:2404.19733, eq. 1)."""


def answer_log_probs(token_losses: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probability (nats, fp64) and number of tokens (fp64) of every answer, both (pairs, 2): chosen, rejected.

    ``token_losses`` (b, s); ``micro_batch`` holds ``loss_mask`` (b, s), ``answers`` (pairs, 2), the number of the
    sequence or of the segment that each answer is in, and ``cu_seqlens`` where segments share a sequence.
    """
    lengths = segment_lengths(micro_batch)
    mask = micro_batch["loss_mask"].to(token_losses.device, torch.float64).flatten()
    sums = segment_sums(-token_losses.double().flatten() * mask, lengths)
    tokens = segment_sums(mask, lengths)
    answers = micro_batch["answers"].to(token_losses.device)
    return sums[answers], tokens[answers]


def preference_losses(log_ratios: Tensor, rule: PreferenceRule) -> Tensor:
    """(pairs, 2) differences of the log-probabilities of policy and reference, chosen and rejected -> (pairs,) losses.

    With h the chosen answer's log-ratio less the rejected one's: sigmoid is -log sigmoid(beta h), smoothed by epsilon
    -(1 - epsilon) log sigmoid(beta h) - epsilon log sigmoid(-beta h); hinge is max(0, 1 - beta h); ipo is
    (h - 1 / (2 beta))^2.
    """
    margin = log_ratios[:, 0] - log_ratios[:, 1]
    if rule.loss == "ipo":
        return (margin - 1 / (2 * rule.beta)) ** 2
    if rule.loss == "hinge":
        return F.relu(1 - rule.beta * margin)
    kept, confused = F.logsigmoid(rule.beta * margin), F.logsigmoid(-rule.beta * margin)
    return -(1 - rule.label_smoothing) * kept - rule.label_smoothing * confused


def forward_step(
    batches: Iterator[MicroBatch], chunk: torch.nn.Module, *, rule: PreferenceRule
) -> tuple[Tensor, LossFunction]:
    """One forward pass of one micro-batch of pairs, whose ``reference`` (pairs, 2) are log-probabilities in nats."""
    micro_batch = next(batches)
    return forward(chunk, micro_batch), partial(pair_loss, micro_batch=micro_batch, rule=rule)


def pair_loss(
    token_losses: Tensor, *, micro_batch: MicroBatch, rule: PreferenceRule
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(b, s) token losses -> the sum of the pairs' losses, the number of pairs (int), and sums for the log.

    megatron-core divides gradients by the pairs of the global batch, so that neither micro-batches nor packs nor the
    number of ranks show in the mean.
    """
    log_probs, tokens = answer_log_probs(token_losses, micro_batch)
    reference = micro_batch["reference"].to(log_probs.device)
    log_ratios = log_probs - reference
    scale = tokens if rule.average_log_probs else torch.ones_like(tokens)
    losses = preference_losses(log_ratios / scale, rule)
    if rule.sft_weight > 0:
        losses = losses - rule.sft_weight * log_probs[:, 0] / tokens[:, 0]
    pairs = torch.tensor(len(losses), dtype=torch.int, device=losses.device)
    loss = losses.sum().to(token_losses.dtype)
    with torch.no_grad():
        rewards = rule.beta * log_ratios / scale
        logged = torch.stack(
            [
                losses.sum(),
                *rewards.sum(dim=0),
                (rewards[:, 0] > rewards[:, 1]).double().sum(),
                *(log_probs / scale).sum(dim=0),
                log_ratios.sum() / 2,
                pairs.double(),
            ]
        )
    return loss, pairs, {SUMS: logged}


def log_prob_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """One forward pass of a reference model: its report holds the answers' log-probabilities, (pairs, 2)."""
    micro_batch = next(batches)

    def report(token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        log_probs, _ = answer_log_probs(token_losses, micro_batch)
        return token_losses.sum(), torch.ones((), dtype=torch.int, device=token_losses.device), {LOG_PROBS: log_probs}

    return forward(chunk, micro_batch), report


def measure(reports: list[dict[str, Tensor]], group: torch.distributed.ProcessGroup, device: Any) -> dict[str, float]:
    """Means per pair over all micro-batches of all data-parallel ranks, under TRL's names; call on the last stage.

    ``preference loss``; ``rewards/chosen`` and ``rewards/rejected``, beta times the log-ratios; ``rewards/margins``,
    their difference; ``rewards/accuracies``, the share of pairs whose chosen answer has the higher reward;
    ``logps/chosen`` and ``logps/rejected``, in nats per answer (per token where averaged); ``kl``, the mean log-ratio
    in nats per answer: the estimate of KL(policy || reference) that is usual for samples of the policy, taken over
    the batch's answers instead, so it may be below 0.
    """
    rows = [report[SUMS] for report in reports]
    total = torch.stack(rows).sum(dim=0) if rows else torch.zeros(len(_SUMMED) + 1, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=group)
    means = dict(zip(_SUMMED, (total[:-1] / total[-1]).tolist(), strict=True))
    return means | {names.REWARD_MARGIN: means[names.CHOSEN_REWARD] - means[names.REJECTED_REWARD]}


def preference_objective(options: DpoConfig) -> Objective:
    """The objective that the options of a run describe."""
    rule = PreferenceRule(
        loss=options.dpo_loss,
        beta=options.dpo_beta,
        label_smoothing=options.dpo_label_smoothing,
        average_log_probs=averages_log_probs(options),
        sft_weight=options.dpo_sft_weight,
    )
    return Objective(loss_name=names.PREFERENCE_LOSS, forward_step=partial(forward_step, rule=rule), measure=measure)
