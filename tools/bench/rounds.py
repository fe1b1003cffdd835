"""Measures the cost of a switch of rounds relative to a step, and commits it to results/rounds.json.

Run: ``python tools/bench/rounds.py`` on a machine that does nothing else, or with ``--render`` to print the table only.
The runs are those of ``bill.py``: the same models, data and ranks, with a new round every three steps.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bill import WORKLOADS, Workload, environment, run_once, write_data
from result_file import measure_and_render

RESULTS = Path(__file__).parent / "results" / "rounds.json"
INTERVAL = 3
STEP_TIME, SWITCH_TIME = "elapsed time per iteration (ms)", "round switch time (ms)"
MOMENTS = {
    "reset": (),
    "carry": ("--hft-moments", "carry"),
    "carry, frozen ones on the host": ("--hft-moments", "carry", "--hft-frozen-moments", "host"),
}


def measure_one(folder: Path, workload: Workload, moments: str, switches: int) -> dict[str, Any]:
    """Medians of one run, in milliseconds; without the first step of each round, which makes moments anew."""
    words = ("--hft-round-interval", str(INTERVAL), *MOMENTS[moments])
    _, metrics = run_once(folder, workload, words, INTERVAL * (switches + 1))
    switched = [line[SWITCH_TIME] for line in metrics if SWITCH_TIME in line]
    assert len(switched) == switches, "one switch per interval"
    steps = [line[STEP_TIME] for line in metrics if STEP_TIME in line and (line["iteration"] - 1) % INTERVAL > 0]
    return {
        "model": workload.name,
        "tokens per rank and step": workload.tokens,
        "moments": moments,
        "switch (ms)": {"median": median(switched), "lowest": min(switched), "highest": max(switched)},
        "step (ms)": {"median": median(steps), "lowest": min(steps), "highest": max(steps)},
    }


def render(results: dict[str, Any]) -> str:
    """The result file as a Markdown table."""
    lines = ["| model | moments | switch (ms) | step (ms) | switch / step |", "|---|---|---|---|---|"]
    for one in results["configurations"]:
        switch, step = one["switch (ms)"], one["step (ms)"]
        spreads = [f"{t['median']:.0f} ({t['lowest']:.0f} to {t['highest']:.0f})" for t in (switch, step)]
        ratio = switch["median"] / step["median"]
        lines.append(f"| {one['model']} | {one['moments']} | {spreads[0]} | {spreads[1]} | {ratio:.2f} |")
    return "\n".join(lines)


def measure(switches: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    configurations = []
    with tempfile.TemporaryDirectory(prefix="rounds-") as name:
        write_data(Path(name))
        for workload in WORKLOADS:
            for moments in MOMENTS:
                print(f"{workload.name}, moments: {moments}", flush=True)
                configurations.append(measure_one(Path(name), workload, moments, switches))
    return {
        "command": f"python tools/bench/rounds.py --switches {switches}",
        "switches": switches,
        "environment": environment(),
        "configurations": configurations,
    }


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure what a switch of rounds costs.")
    parser.add_argument("--switches", type=int, default=5, help="switches of a run (default: 5)")
    return measure_and_render(parser, RESULTS, lambda options: measure(options.switches), render)


if __name__ == "__main__":
    sys.exit(main())
