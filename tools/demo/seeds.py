"""Repeats the demo's comparison over three seeds and commits the spread to a file; the README's table is made from it.

Run: ``python tools/demo/seeds.py`` (about 20 minutes on two cores), or with ``--render`` to rewrite the table only.
The seeds decide the order of the training rows and which matrices HFT trains; the pretrained model is always the same.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import settings
from comparison import Evaluation, Outcome, compare, evaluate
from launching import exit_code_of
from prepare import prepare
from table import render, replace_table

SEEDS = (1, 2, 3)
RESULTS = Path(__file__).parent / "results" / "three_seeds.json"
README = settings.REPOSITORY / "README.md"


def measure() -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a training fails."""
    prepared = prepare(settings.DEFAULT_FOLDER)
    output = settings.REPOSITORY / "runs" / f"demo-seeds-{time.strftime('%Y%m%d-%H%M%S')}"
    before = evaluate(prepared.model, 0)
    outcomes: list[Outcome] = []
    for seed in SEEDS:
        print(f"seed {seed}, into {output}", flush=True)
        outcomes += compare(prepared, output / f"seed_{seed}", seed)
    return {
        "command": "python tools/demo/seeds.py",
        "environment": {
            "cores": os.cpu_count(),
            "processor": processor_name(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        },
        "facts": settings.PEOPLE * 3,
        "new-task questions": settings.NEW_TASK_QUESTIONS,
        "pretraining steps": settings.PRETRAINING_STEPS,
        "fine-tuning options": list(settings.FINE_TUNING_OPTIONS),
        "before": asdict(before),
        "outcomes": [one.to_dict() for one in outcomes],
    }


def table_of(results: dict[str, Any]) -> str:
    """The README's table of a result file's contents."""
    return render(Evaluation(**results["before"]), [Outcome.from_dict(one) for one in results["outcomes"]])


def processor_name() -> str:
    """The processor as Linux calls it, or the machine's kind where there is no /proc."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_results() -> None:
    """Measure, and write the result file. Raises DemoError when a training fails."""
    results = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_table() -> None:
    """Put the table of the result file into the README."""
    table = table_of(json.loads(RESULTS.read_text(encoding="utf-8")))
    README.write_text(replace_table(README.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


def main() -> int:
    """Measure unless only the table is asked for, then rewrite the README's table."""
    parser = argparse.ArgumentParser(description="Measure the demo over three seeds and put the table into the README.")
    parser.add_argument("--render", action="store_true", help="only rewrite the table, from the committed results")
    if parser.parse_args().render:
        return exit_code_of(write_table)
    return exit_code_of(write_results) or exit_code_of(write_table)


if __name__ == "__main__":
    sys.exit(main())
