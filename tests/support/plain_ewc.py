"""Elastic weight consolidation that a run must equal: transformers' LLaMA, autograd on the penalised loss, AdamW."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.hft.plan import Plan, make_plan
from tests.support.plain_run import Example, learning_rate, parse, samples_of_files, token_loss

LAMBDA, BATCHES, STEPS = 1000.0, 3, 5
"""EWC's lambda, and batches and steps of every task."""


def named(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters()}


def mean_loss(model: LlamaForCausalLM, batch: Sequence[Sequence[Example]]) -> Tensor:
    sums = [token_loss(model, example)[:2] for sample in batch for example in sample]
    return torch.stack([loss for loss, _ in sums]).sum() / sum(tokens for _, tokens in sums)


def plain_fisher(model: LlamaForCausalLM, samples: Any) -> dict[str, Tensor]:
    model.requires_grad_(True)
    found = {unit: torch.zeros_like(p) for unit, p in named(model).items()}
    for step in range(BATCHES):
        model.zero_grad()
        mean_loss(model, samples(step)).backward()
        for unit, p in named(model).items():
            assert p.grad is not None
            found[unit] += p.grad**2 / BATCHES
    return found


def plain_penalty(model: LlamaForCausalLM, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
    terms = [(fisher[unit] * (p - anchor[unit]) ** 2).sum() for unit, p in named(model).items() if p.requires_grad]
    return LAMBDA / 2 * torch.stack(terms).sum()


@dataclass
class PlainTask:
    """A single task by transformers and autograd on the penalised loss."""

    plan: Plan
    losses: list[float]
    penalties: list[float]
    norms: list[float]
    fisher: dict[str, Tensor]


def plain_task(
    model: LlamaForCausalLM, words: list[str], shape: ModelShape, fisher: Mapping[str, Tensor] | None
) -> PlainTask:
    config = parse("sft", words)
    round = config.hft.hft_first_round
    assert round is not None
    plan = make_plan(shape, config.hft, default_seed=config.training.seed, round=round)
    samples, _ = samples_of_files("sft", config, shape)
    for unit, p in named(model).items():
        p.requires_grad = plan.trains(unit)
    anchor = {unit: p.detach().clone() for unit, p in named(model).items()}
    trained = [p for p in named(model).values() if p.requires_grad]
    options = config.optimizer
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ],
        eps=options.adam_eps,
        betas=(options.adam_beta1, options.adam_beta2),
    )
    losses, penalties, norms = [], [], []
    for step in range(STEPS):
        model.zero_grad()
        loss = mean_loss(model, samples(step))
        penalty = torch.zeros(()) if fisher is None else plain_penalty(model, fisher, anchor)
        (loss + penalty).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, options.clip_grad)))
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, step)
        adam.step()
        losses.append(loss.item())
        penalties.append(penalty.item())
    found = plain_fisher(model, samples)
    total = found if fisher is None else {unit: fisher[unit] + values for unit, values in found.items()}
    return PlainTask(plan=plan, losses=losses, penalties=penalties, norms=norms, fisher=total)
