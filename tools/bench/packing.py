"""Measures short examples packed against one example per row, paired and alternating, into results/packing.json.

Run: ``python tools/bench/packing.py`` on a machine that does nothing else, or with ``--render`` for the line only.
The examples have the lengths of grade-school word problems (GSM8K under Llama 2's tokenizer: 198 positions on average,
at most 572) by a log-normal distribution; their text is that of ``bill.py``. A step of either way has about as many.
"""

import argparse
import json
import random
import sys
import tempfile
from math import log, sqrt
from pathlib import Path
from statistics import median
from typing import Any

from bill import RANKS, Workload, environment, run_once, write_data
from result_file import in_turn, measure_and_render

RESULTS = Path(__file__).parent / "results" / "packing.json"
EXAMPLES = 400
MEAN, DEVIATION, LONGEST = 198, 67, 572
CAPACITY = 2048
MODEL = (
    *("--num-layers", "4", "--hidden-size", "256", "--ffn-hidden-size", "704", "--num-attention-heads", "4"),
    *("--max-position-embeddings", str(CAPACITY), "--vocab-size", "1024"),
)

WAYS = {
    "packed": (Workload(name="packed", model=MODEL, sequence=CAPACITY, sequences_per_rank=1), ("--packing",)),
    "one per row": (Workload(name="one per row", model=MODEL, sequence=CAPACITY, sequences_per_rank=10), ()),
}


def write_examples(folder: Path) -> dict[str, float]:
    """``folder/train.jsonl`` with examples of those lengths; the positions that a step of each way holds on average."""
    from hft_megatron.config.data import DataConfig
    from hft_megatron.data.loading import training_data
    from hft_megatron.data.order import sample_stream, samples_of_epochs
    from hft_megatron.data.tokenizer_loading import load_tokenizer

    write_data(folder)
    tokenizer = load_tokenizer(None, folder / "tokenizer.model")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenizer.encode("".join(json.loads(line)["completion"] for line in lines))
    spread = log(1 + (DEVIATION / MEAN) ** 2)
    draw = random.Random(0)
    rows, start = [], 0
    for _ in range(EXAMPLES):
        stop = start + min(LONGEST, round(draw.lognormvariate(log(MEAN) - spread / 2, sqrt(spread))))
        rows.append({"prompt": "Go on:", "completion": tokenizer.decode(ids[start:stop])})
        start = stop
    assert start <= len(ids), "there is too little text"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = DataConfig(train_data_path=(str(folder / "train.jsonl"),), packing=True)
    dataset = training_data(options, tokenizer, CAPACITY)
    assert dataset is not None
    samples = sample_stream(dataset.order(seed=1234), dataset.lengths - 1, CAPACITY, options)
    positions = int(dataset.lengths.sum()) - len(dataset)
    return {
        "packed": RANKS * positions / samples_of_epochs(samples, 1),
        "one per row": RANKS * WAYS["one per row"][0].sequences_per_rank * positions / len(dataset),
    }


def measure(pairs: int, steps: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    with tempfile.TemporaryDirectory(prefix="packing-") as name:
        folder = Path(name)
        positions = write_examples(folder)
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for pair, way in in_turn(WAYS, pairs):
            print(f"pair {pair}: {way}", flush=True)
            workload, options = WAYS[way]
            _, metrics = run_once(folder, workload, options, steps)
            times = [record["elapsed time per iteration (ms)"] for record in metrics[2:]]
            rates[way].append(1e3 * positions[way] / median(times))
    ratios = [packed / row for packed, row in zip(*rates.values(), strict=True)]
    return {
        "command": f"python tools/bench/packing.py --pairs {pairs} --steps {steps}",
        "environment": environment(),
        "model": MODEL,
        "positions of a step": positions,
        "examples' tokens per second": rates,
        "packed over one per row": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    }


def render(results: dict[str, Any]) -> str:
    """The result file as one sentence."""
    rates = {way: median(values) for way, values in results["examples' tokens per second"].items()}
    ratio = results["packed over one per row"]
    return (
        f"packed {rates['packed']:,.0f} tokens/s, one per row {rates['one per row']:,.0f}: "
        f"{ratio['median']:.2f} times as many ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
    )


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure packed against unpacked training.")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run; the first two don't count (default: 8)")
    return measure_and_render(parser, RESULTS, lambda options: measure(options.pairs, options.steps), render)


if __name__ == "__main__":
    sys.exit(main())
