"""Preference pairs made on the spot, and the words of a tuning on them."""

import json
from pathlib import Path
from typing import Any

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
    """Writes pairs, every other one of messages; the chosen answer is polite."""
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
    """The words of a tuning; later options override. ``cache`` is one for the module's tests."""
    base = ["--load-hf", inputs / "model", "--train-data-path", inputs / "pairs.jsonl", "--seq-length", 96]
    base += ["--train-iters", 20, "--global-batch-size", BATCH, "--lr", LR, "--lr-decay-style", "constant"]
    base += ["--weight-decay", DECAY, "--clip-grad", CLIP, "--dpo-beta", 0.5]
    base += ["--dpo-reference", kind]
    if kind == "precompute":
        base += ["--dpo-reference-cache", cache or inputs / "cache"]
    return [str(word) for word in (*base, "--no-bf16", *options)]
