"""``make demo``: prepare the model and data, half and fully fine-tune on the new task with TP 2, and print the table.

Run: ``python tools/demo/run.py``. About ten minutes on two cores the first time, half as long when runs/demo is there.
"""

import json
import sys
import time

import settings
from comparison import compare, evaluate
from launching import exit_code_of
from prepare import prepare
from table import render

SEED = 1


def demo() -> None:
    """Everything from nothing to the table. Raises DemoError when a step fails."""
    start = time.monotonic()
    prepared = prepare(settings.DEFAULT_FOLDER)
    output = settings.REPOSITORY / "runs" / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    print(f"fine-tuning on the new task, half and full, into {output}", flush=True)
    before = evaluate(prepared.model, 0)
    outcomes = compare(prepared, output, SEED)
    (output / "outcomes.json").write_text(json.dumps([one.to_dict() for one in outcomes], indent=2) + "\n")
    print(f"\n{render(before, outcomes)}\n")
    print(
        f"Shares of exact answers, by greedy decoding with transformers: {settings.NEW_TASK_QUESTIONS} questions about "
        f"unseen phrases (new task), {settings.PEOPLE * 3} facts asked in unseen wordings (old knowledge).\n"
        "One seed says little about the gap: tools/demo/results/three_seeds.json has the spread.\n"
        "With TP 2 on two ranks there is no data parallelism and nothing is sent for it; the last row is measured on "
        "four ranks.\nExported models after the same number of steps:"
    )
    for outcome in outcomes:
        print(f"  {outcome.method}: {output / outcome.method / outcome.at_equal_steps.model}")
    print(f"The demo took {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    sys.exit(exit_code_of(demo))
