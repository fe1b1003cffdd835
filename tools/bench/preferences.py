"""Measures whether preference tuning generalises from real pairs to held-out ones, into results/preferences.json.

Run: ``python tools/bench/preferences.py --data FOLDER`` (15 minutes on two cores), or with ``--render`` for the table.
FOLDER/preference holds released pairs: ``ultrafeedback_train``, ``ultrafeedback_eval``, ``hh_mixed_norm`` and
``dpo_en_demo_norm``, each ``.jsonl``. All of them are used, in folds by cross-validation: every pair is held out of one
tuning and counts once. Pairs of one prompt are in one fold. A small model with random weights is tuned with half the
weights and with all, under the same options, which were chosen by a look at the first fold; chance would give 50 %.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bill import DEMO, environment, train_tokenizer
from bill_summary import METHODS
from launching import DemoError, cpu_environment, run_logged
from result_file import measure_and_render

REPOSITORY = DEMO.parents[1]
RESULTS = Path(__file__).parent / "results" / "preferences.json"
FILES = ("ultrafeedback_train", "ultrafeedback_eval", "hh_mixed_norm", "dpo_en_demo_norm")
PIECES = 2048
OPTIONS = (
    *("--num-layers", "1", "--hidden-size", "64", "--ffn-hidden-size", "172", "--num-attention-heads", "1"),
    *("--max-position-embeddings", "2048", "--vocab-size", str(PIECES)),
    *("--seq-length", "2048", "--long-examples", "truncate", "--dpo-bad-pairs", "skip", "--packing"),
    *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-epochs", "1"),
    *("--lr", "2e-3", "--min-lr", "0", "--lr-decay-style", "linear", "--dpo-reference", "shared", "--no-bf16"),
)

_HELD_OUT = re.compile(r"> .*/held-out\.jsonl: (\d+) pairs")
_AT_END = re.compile(r"validation loss at .*rewards/accuracies value: (\S+) .*rewards/margins value: (\S+)")


def read_pairs(data: Path) -> list[dict[str, Any]]:
    """All pairs, without the other keys of a row."""
    rows = []
    for name in FILES:
        for line in (data / "preference" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
    return rows


def write_folds(pairs: Sequence[dict[str, Any]], folds: int, folder: Path) -> None:
    """``folder/NUMBER/{train,held-out}.jsonl`` and a tokenizer of all texts, which tells nothing of preferences."""
    prompts = sorted({json.dumps(pair["prompt"]) for pair in pairs})
    random.Random(0).shuffle(prompts)
    fold_of = {prompt: number % folds for number, prompt in enumerate(prompts)}
    for fold in range(folds):
        parts: dict[str, list[str]] = {"train": [], "held-out": []}
        for pair in pairs:
            part = "held-out" if fold_of[json.dumps(pair["prompt"])] == fold else "train"
            parts[part].append(json.dumps(pair) + "\n")
        (folder / str(fold)).mkdir()
        for part, lines in parts.items():
            (folder / str(fold) / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [answer for pair in pairs for answer in (_text(pair["chosen"]), _text(pair["rejected"]))]
    train_tokenizer(folder, "\n".join(texts), PIECES)


def _text(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def tune(method: str, fold: int, folder: Path) -> dict[str, Any]:
    """One tuning, and its preferences on the held-out pairs. Raises DemoError when it fails."""
    place = folder / str(fold)
    save, log = place / method, place / f"{method}.log"
    command = [
        *(sys.executable, "-m", "hft_megatron", "dpo", *OPTIONS, "--hft-ratio", METHODS[method]),
        *("--train-data-path", str(place / "train.jsonl"), "--valid-data-path", str(place / "held-out.jsonl")),
        *("--tokenizer-model", str(folder / "tokenizer.model"), "--save", str(save), "--eval-interval", "100000"),
    ]
    variables = cpu_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    run_logged(command, environment=variables, folder=REPOSITORY, log=log)
    said = log.read_text(encoding="utf-8")
    pairs, (accuracy, margin) = int(_only(_HELD_OUT, said, log)), _only(_AT_END, said, log)
    return {"fold": fold, "pairs": pairs, "accuracy": float(accuracy), "margin": float(margin)}


def _only(pattern: re.Pattern[str], text: str, log: Path) -> Any:
    found = pattern.findall(text)
    if len(found) != 1:
        raise DemoError(f"{log}: {len(found)} lines like {pattern.pattern!r} instead of one")
    return found[0]


def measure(data: Path, folds: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    with tempfile.TemporaryDirectory(prefix="preferences-") as name:
        folder = Path(name)
        write_folds(read_pairs(data), folds, folder)
        jobs = [(method, fold) for method in METHODS for fold in range(folds)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tuned = list(pool.map(lambda job: tune(job[0], job[1], folder), jobs))
    return {
        "command": f"python tools/bench/preferences.py --data FOLDER --folds {folds}",
        "environment": environment(),
        "files": FILES,
        "options": " ".join(OPTIONS),
        "held out": {
            method: [one for (of, _), one in zip(jobs, tuned, strict=True) if of == method] for method in METHODS
        },
    }


def render(results: dict[str, Any]) -> str:
    """The result file as a Markdown table; the error is that of as many throws of a coin."""
    lines = ["| | held-out pairs | preferred as people did | above chance, in standard errors |", "|---|---|---|---|"]
    for method, folds in results["held out"].items():
        pairs = sum(fold["pairs"] for fold in folds)
        accuracy = sum(fold["accuracy"] * fold["pairs"] for fold in folds) / pairs
        errors = (accuracy - 0.5) / (0.5 / math.sqrt(pairs))
        lines.append(f"| {method} | {pairs:,} | {100 * accuracy:.1f} % | {errors:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure preference tuning on real pairs.")
    parser.add_argument("--data", type=Path, help="folder with preference/*.jsonl")
    parser.add_argument("--folds", type=int, default=5, help="parts, each held out once (default: 5)")

    def asked(options: argparse.Namespace) -> dict[str, Any]:
        if options.data is None:
            parser.error("--data is missing")
        return measure(options.data, options.folds)

    return measure_and_render(parser, RESULTS, asked, render)


if __name__ == "__main__":
    sys.exit(main())
