"""Measures checkpoints (their size, their time, and how long training stands still) into results/checkpoints.json.

Run: ``python tools/bench/checkpoints.py`` on a machine that does nothing else, or with ``--render`` for the table.
The runs are those of ``bill.py`` with its larger model; what is summarised is what each run says of its own saves.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bill import WORKLOADS, DemoError, environment, run_once, write_data

RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
INTERVAL = 2
WAYS = {
    "full": ("--hft-ratio", "1"),
    "half": (),
    "half, --save-trained-only": ("--save-trained-only",),
    "half, --async-save": ("--async-save",),
    "half, --save-trained-only --async-save": ("--save-trained-only", "--async-save"),
}
SAID = re.compile(r"successfully saved .*: ([\d,.]+) MB in ([\d,]+) ms, training stood still for ([\d,]+) ms")


def measure_one(folder: Path, way: str, saves: int) -> dict[str, Any]:
    """Medians of one run's saves but the first, which makes things for the first time (and under --save-trained-only
    is whole), and the last, which the end of the run waits for."""
    log = folder / "runs.log"
    start = log.stat().st_size if log.exists() else 0
    words = (*WAYS[way], "--save-interval", str(INTERVAL))
    run_once(folder, WORKLOADS[-1], words, INTERVAL * (saves + 2))
    said = SAID.findall(log.read_text(encoding="utf-8")[start:])
    assert len(said) == saves + 2, "one save per interval"
    size, total, stall = zip(*([float(number.replace(",", "")) for number in one] for one in said[1:-1]), strict=True)
    return {
        "way": way,
        "size (MB)": median(size),
        "time (ms)": {"median": median(total), "lowest": min(total), "highest": max(total)},
        "stall (ms)": {"median": median(stall), "lowest": min(stall), "highest": max(stall)},
    }


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


def main() -> int:
    """Measure into the result file unless only the table is asked for, then print the table."""
    parser = argparse.ArgumentParser(description="Measure what checkpoints cost.")
    parser.add_argument("--render", action="store_true", help="only print the table, from the result file")
    parser.add_argument("--saves", type=int, default=3, help="saves of a run that count (default: 3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the result file (default: the committed one)")
    options = parser.parse_args()
    if not options.render:
        ways = []
        with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
            write_data(Path(name))
            try:
                for way in WAYS:
                    print(way, flush=True)
                    ways.append(measure_one(Path(name), way, options.saves))
            except DemoError as error:
                print(f"bench: {error}", file=sys.stderr)
                return 1
        results = {
            "command": f"python tools/bench/checkpoints.py --saves {options.saves}",
            "saves": options.saves,
            "model": WORKLOADS[-1].name,
            "environment": environment(),
            "ways": ways,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(render(json.loads(options.output.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
