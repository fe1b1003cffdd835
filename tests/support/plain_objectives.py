"""Objectives of fine-tuning by their formulas: transformers' logits, autograd, one example at a time, in fp64."""

from collections.abc import Callable, Sequence
from statistics import median_low

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.support.plain_run import Answer

Loss = Callable[[LlamaForCausalLM, LlamaForCausalLM, Sequence[Answer]], Tensor]
"""Loss of the trained model, the first weights' model, and the examples of a batch."""


def log_probs(model: LlamaForCausalLM, example: Answer) -> Tensor:
    """(positions, vocabulary)."""
    found: Tensor = model(example.tokens[None]).logits[0].log_softmax(dim=-1)
    return found


def of_labels(found: Tensor, example: Answer) -> Tensor:
    """Losses of the trained tokens, (n,)."""
    return -found.gather(1, example.labels[:, None])[example.mask, 0]


def nll(model: LlamaForCausalLM, first: LlamaForCausalLM, batch: Sequence[Answer]) -> Tensor:
    return torch.cat([of_labels(log_probs(model, example), example) for example in batch]).mean()


def dft(model: LlamaForCausalLM, first: LlamaForCausalLM, batch: Sequence[Answer]) -> Tensor:
    losses = torch.cat([of_labels(log_probs(model, example), example) for example in batch])
    return ((-losses).exp().detach() * losses).mean()


def eaft(model: LlamaForCausalLM, first: LlamaForCausalLM, batch: Sequence[Answer]) -> Tensor:
    losses, weights = [], []
    for example in batch:
        found = log_probs(model, example)
        losses.append(of_labels(found, example))
        likeliest = found[example.mask].detach().exp().topk(20).values
        shares = likeliest / likeliest.sum(dim=1, keepdim=True)
        weights.append(-(shares * shares.log()).sum(dim=1) / 3.0)
    return (torch.cat(weights) * torch.cat(losses)).mean()


def talr(model: LlamaForCausalLM, first: LlamaForCausalLM, batch: Sequence[Answer]) -> Tensor:
    losses = [of_labels(log_probs(model, example), example) for example in batch]
    temperature = median_low([float(one.mean()) for one in losses])
    together = torch.cat(losses)
    weights = (-together.detach()).exp() ** (1 / temperature)
    return (weights.clamp_min(0.01) * together).mean()


def divergence(model: LlamaForCausalLM, first: LlamaForCausalLM, batch: Sequence[Answer]) -> Tensor:
    """KL(first || model), the mean over trained tokens."""
    found = []
    for example in batch:
        with torch.no_grad():
            expected = log_probs(first, example)[example.mask]
        mine = log_probs(model, example)[example.mask]
        found.append(F.kl_div(mine, expected, log_target=True, reduction="none").sum(dim=1))
    return torch.cat(found).mean()


def with_divergence(loss: Loss, beta: float) -> Loss:
    return lambda model, first, batch: loss(model, first, batch) + beta * divergence(model, first, batch)


def mixed_losses(model: LlamaForCausalLM, example: Answer, share: float) -> Tensor:
    """IFT's token losses, (positions,), 0 where nothing is trained."""
    with torch.no_grad():
        likeliest = model(example.tokens[None]).logits[0].argmax(dim=-1)
        predicted = example.tokens.clone()
        for place in range(1, len(predicted)):
            if example.mask[place - 1]:
                predicted[place] = likeliest[place - 1]
        table = model.get_input_embeddings().weight
        embedded = (1 - share) * table[example.tokens] + share * table[predicted]
    found = model(inputs_embeds=embedded[None]).logits[0].log_softmax(dim=-1)
    return -found.gather(1, example.labels[:, None])[:, 0] * example.mask


def weighted_mean(losses: Tensor, mask: Tensor, gamma: float, *, detached: bool) -> Tensor:
    """IFT's loss of an example, by a matrix of discounts."""
    if gamma == 0:
        return losses[mask].mean()
    places = torch.arange(len(losses))
    distances = (places[None, :] - places[:, None]).double()
    discounts = torch.where(distances >= 0, gamma ** distances.clamp_min(0), 0.0)
    following = (discounts @ losses)[mask]
    if detached:
        following = following.detach()
    return (losses[mask] * following).sum() / following.sum()


def ift(share: float, gamma: float, *, detached: bool) -> Loss:
    def loss(model: LlamaForCausalLM, first: LlamaForCausalLM, batch: Sequence[Answer]) -> Tensor:
        return torch.stack(
            [
                weighted_mean(mixed_losses(model, example, share), example.mask, gamma, detached=detached)
                for example in batch
            ]
        ).mean()

    return loss


LOSSES: dict[str, tuple[list[str], Loss]] = {
    "dft": (["--objective", "dft"], dft),
    "eaft": (["--objective", "eaft"], eaft),
    "talr": (["--objective", "talr"], talr),
    "asft": (["--objective", "asft", "--kl-reference", "model"], with_divergence(dft, 0.1)),
    "kl": (["--kl-to-base", "0.3"], with_divergence(nll, 0.3)),
    "talr and kl": (["--objective", "talr", "--kl-to-base", "0.2"], with_divergence(talr, 0.2)),
    "ift": (["--objective", "ift"], ift(0.2, 0.95, detached=False)),
    "ift detached": (
        ["--objective", "ift", "--ift-weights", "detached", "--ift-lambda", "0.5", "--ift-gamma", "0.8"],
        ift(0.5, 0.8, detached=True),
    ),
}
"""Options, and the loss that they select."""
