"""Preference pairs made on the spot, and what a tuning on them must equal: a plain PyTorch loop over transformers."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hft_megatron.config.schema import DataConfig, DpoConfig
from hft_megatron.data.order import SampleStream
from hft_megatron.data.pairs import PairDataset
from hft_megatron.data.run_data import training_pairs
from hft_megatron.data.tokenizers import load_tokenizer
from hft_megatron.hft.plan import Plan
from hft_megatron.objectives.dpo import PreferenceRule, preference_losses
from tests.support.models import make_llama
from tests.support.runs import VOCAB_SIZE
from tests.support.tokenizers import make_byte_level

BATCH = 4
LR, DECAY, CLIP = 2e-3, 0.1, 1.0


def make_pairs(folder: Path, variant: str = "gqa", **overrides: Any) -> Path:
    """``folder/model`` (weights and tokenizer) and ``folder/pairs.jsonl``: 24 pairs of very different lengths."""
    make_llama(folder / "model", variant, **{"vocab_size": VOCAB_SIZE} | overrides)
    make_byte_level(folder / "model")
    write_pairs(folder / "pairs.jsonl", 24)
    return folder


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """Every other pair is of messages; the chosen answer is polite."""
    rows: list[dict[str, Any]] = []
    for i in range(first, first + count):
        prompt = f"Say {i}{'!' * (i % 7)}"
        chosen, rejected = f"yes, {3 * i} {'bridge ' * (1 + i % 5)}", f"no {'!' * (1 + i % 11)}"
        if i % 2:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            continue
        user = {"role": "user", "content": prompt}
        halves = [[user, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
        rows.append({"chosen": halves[0], "rejected": halves[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_for_pairs(inputs: Path, *options: object, kind: str = "precompute", cache: Path | None = None) -> list[str]:
    """The words of a tuning that ``plain_dpo`` repeats; later options win. ``cache`` is one for the module's tests."""
    base = ["--load-hf", inputs / "model", "--train-data-path", inputs / "pairs.jsonl", "--seq-length", 96]
    base += ["--train-iters", 20, "--global-batch-size", BATCH, "--lr", LR, "--lr-decay-style", "constant"]
    base += ["--weight-decay", DECAY, "--clip-grad", CLIP, "--dpo-beta", 0.5]
    base += ["--dpo-reference", kind]
    if kind == "precompute":
        base += ["--dpo-reference-cache", cache or inputs / "cache"]
    return [str(word) for word in (*base, "--no-bf16", *options)]


def flags(layout: dict[str, Any]) -> list[str]:
    """Fields of ParallelConfig as words."""
    words = []
    for name, value in layout.items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return words


def pairs_of(inputs: Path) -> PairDataset:
    data = DataConfig(train_data_path=(str(inputs / "pairs.jsonl"),))
    tokenizer = load_tokenizer(None, str(inputs / "model"), None)
    pairs = training_pairs(data, tokenizer, 96, DpoConfig.dpo_bad_pairs)
    assert pairs is not None
    return pairs


def plain_dpo(
    inputs: Path, plan: Plan, samples: SampleStream, rule: PreferenceRule, steps: int
) -> list[dict[str, float]]:
    """Loss, gradient norm and rewards of each step; every answer goes through the model on its own."""
    pairs = pairs_of(inputs)
    policy, reference = (LlamaForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32) for _ in range(2))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad = name.removesuffix(".weight") in plan.training
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    results = []
    for step in range(steps):
        numbers = [pair for at in range(step * BATCH, (step + 1) * BATCH) for pair in samples.sample(at)]
        log_probs = torch.stack([_log_probs(policy, pairs, pair) for pair in numbers])
        with torch.no_grad():
            expected = torch.stack([_log_probs(reference, pairs, pair) for pair in numbers])
        tokens = torch.tensor([[int(pairs.answers.example(2 * p + h)[1][1:].sum()) for h in (0, 1)] for p in numbers])
        scale = tokens if rule.average_log_probs else torch.ones_like(tokens)
        losses = preference_losses((log_probs - expected) / scale, rule)
        losses = losses - rule.sft_weight * log_probs[:, 0] / tokens[:, 0]
        optimizer.zero_grad()
        losses.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, CLIP if CLIP > 0 else math.inf))
        optimizer.step()
        rewards = rule.beta * ((log_probs - expected) / scale).detach().mean(dim=0)
        results.append(
            {
                "loss": losses.mean().item(),
                "grad_norm": norm,
                "rewards/chosen": float(rewards[0]),
                "rewards/rejected": float(rewards[1]),
            }
        )
    return results


def _log_probs(model: LlamaForCausalLM, pairs: PairDataset, pair: int) -> torch.Tensor:
    found = []
    for half in (2 * pair, 2 * pair + 1):
        ids, trained = pairs.answers.example(half)
        tokens = torch.from_numpy(ids.astype("int64"))
        of_tokens = model(tokens[None, :-1]).logits[0].float().log_softmax(dim=-1)
        chosen = of_tokens.gather(1, tokens[1:, None])[:, 0]
        found.append(chosen[torch.from_numpy(trained[1:])].double().sum())
    return torch.stack(found)
