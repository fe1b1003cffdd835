"""Measures the memory and cost of each kind of reference model in preference tuning, into results/reference.json.

Run: ``python tools/bench/reference.py`` on a machine that does nothing else, or with ``--render`` for the table only.
The models and the text are those of ``bill.py``; a pair is two stretches of it, of one length.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bill import WORKLOADS, Workload, environment, run_once, write_data
from result_file import measure_and_render

RESULTS = Path(__file__).parent / "results" / "reference.json"
KINDS = ("precompute", "shared", "model")
STEP_TIME, HELD = "elapsed time per iteration (ms)", "reference bytes"


def write_pairs(folder: Path) -> None:
    """Replaces the examples that ``bill.py`` wrote to ``folder/train.jsonl`` by pairs."""
    path = folder / "train.jsonl"
    texts = [json.loads(line)["completion"] for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"prompt": "Go on:", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=False)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def measure(workload: Workload, rounds: int, steps: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    with tempfile.TemporaryDirectory(prefix="reference-") as name:
        folder = Path(name)
        write_data(folder)
        write_pairs(folder)
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        held: dict[str, int] = {}
        for number in range(rounds):
            # Another one first each time, so that drift affects all.
            for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
                print(f"round {number + 1}: {kind}", flush=True)
                words = ["--dpo-reference", kind, "--dpo-bad-pairs", "skip"]
                if kind == "precompute":
                    words += ["--dpo-reference-cache", str(folder / "cache")]
                _, metrics = run_once(folder, workload, words, steps, method="dpo")
                records = [record for record in metrics if HELD in record]
                held[kind] = int(records[-1][HELD])
                times[kind].append(median(record[STEP_TIME] for record in records[2:]))
    trained = records[-1]["trainable params"], records[-1]["frozen params"]
    return {
        "command": f"python tools/bench/reference.py --rounds {rounds} --steps {steps}",
        "environment": environment(),
        "model": workload.name,
        "share of the parameters that trains": trained[0] / sum(trained),
        "held by the last rank (bytes)": held,
        "step (ms)": times,
    }


def render(results: dict[str, Any]) -> str:
    """The result file as a Markdown table."""
    lines = ["| reference | held per rank (MB) | step (ms) | step / step with `precompute` |", "|---|---|---|---|"]
    held, times = results["held by the last rank (bytes)"], results["step (ms)"]
    for kind in KINDS:
        ratio = median(one / other for one, other in zip(times[kind], times["precompute"], strict=True))
        spread = f"{median(times[kind]):.0f} ({min(times[kind]):.0f} to {max(times[kind]):.0f})"
        lines.append(f"| `{kind}` | {held[kind] / 1e6:.1f} | {spread} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure the three kinds of reference model.")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run; the first two don't count (default: 8)")
    return measure_and_render(
        parser, RESULTS, lambda options: measure(WORKLOADS[0], options.rounds, options.steps), render
    )


if __name__ == "__main__":
    sys.exit(main())
