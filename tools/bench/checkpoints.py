"""Measures checkpoints (their size, their time, and the stall of training) into results/checkpoints.json.

Run: ``python tools/bench/checkpoints.py`` on a machine that does nothing else, or with ``--render`` for the table.
The runs are those of ``bill.py`` with its larger model; each run's own report of its saves is summarised.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bill import WORKLOADS, environment, run_once, write_data
from result_file import in_turn, measure_and_render

RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
INTERVAL = 2
WAYS = {
    "full": ("--hft-ratio", "1"),
    "half": (),
    "half, --save-trained-only": ("--save-trained-only",),
    "half, --async-save": ("--async-save",),
    "half, --save-trained-only --async-save": ("--save-trained-only", "--async-save"),
}
SAID = re.compile(r"successfully saved .*: ([\d,.]+) MB in ([\d,]+) ms, training paused for ([\d,]+) ms")


def measure_one(folder: Path, way: str, saves: int) -> list[tuple[float, ...]]:
    """(MB, ms, ms of stall) of one run's saves except the first, which makes things for the first time (and under
    --save-trained-only is whole), and the last, which the end of the run waits for."""
    log = folder / "runs.log"
    start = log.stat().st_size if log.exists() else 0
    words = (*WAYS[way], "--save-interval", str(INTERVAL))
    run_once(folder, WORKLOADS[-1], words, INTERVAL * (saves + 2))
    said = SAID.findall(log.read_text(encoding="utf-8")[start:])
    assert len(said) == saves + 2, "one save per interval"
    return [tuple(float(number.replace(",", "")) for number in one) for one in said[1:-1]]


def summary(way: str, saves: list[tuple[float, ...]]) -> dict[str, Any]:
    """Medians and spreads over the saves of all runs."""
    size, *times = zip(*saves, strict=True)
    spreads = [{"median": median(time), "lowest": min(time), "highest": max(time)} for time in times]
    return {"way": way, "size (MB)": median(size), "time (ms)": spreads[0], "stall (ms)": spreads[1]}


def render(results: dict[str, Any]) -> str:
    """The result file as a Markdown table."""
    lines = ["| checkpoints of | size (MB) | time (ms) | training stands still (ms) |", "|---|---|---|---|"]
    for one in results["ways"]:
        spreads = [
            f"{t['median']:,.0f} ({t['lowest']:,.0f} to {t['highest']:,.0f})"
            for t in (one["time (ms)"], one["stall (ms)"])
        ]
        lines.append(f"| {one['way']} | {one['size (MB)']:,.0f} | {spreads[0]} | {spreads[1]} |")
    return "\n".join(lines)


def measure(pairs: int, saves: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    measured: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        write_data(Path(name))
        for pair, way in in_turn(WAYS, pairs):
            print(f"pair {pair}: {way}", flush=True)
            measured[way] += measure_one(Path(name), way, saves)
    return {
        "command": f"python tools/bench/checkpoints.py --pairs {pairs} --saves {saves}",
        "model": WORKLOADS[-1].name,
        "environment": environment(),
        "ways": [summary(way, saves_of_way) for way, saves_of_way in measured.items()],
    }


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure what checkpoints cost.")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each way (default: 2)")
    parser.add_argument("--saves", type=int, default=3, help="saves of a run that count (default: 3)")
    return measure_and_render(parser, RESULTS, lambda options: measure(options.pairs, options.saves), render)


if __name__ == "__main__":
    sys.exit(main())
