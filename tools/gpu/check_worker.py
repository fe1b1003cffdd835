"""The process in which checks run one after the other; ``acceptance.py`` starts it, and kills it where a check hangs.

It adds a JSON line to the file of events when a check begins and when it has ended, and itself ends with the first
check that fails: leftovers of a failure must not disturb the next check.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from working_site import CheckFailed, Site, expect

ABSENT_DEVICE = "torch finds no CUDA device; --toy runs the same code on CPU"


def run_checks(checks: list[Mapping[str, str]], site: Site, events: Path) -> int:
    """Each of ``checks`` has a ``name``, a ``target`` and ``alone``; returns the exit code of the process."""
    for check in checks:
        if site.rank == 0:
            add_event(events, {"check": check["name"], "began": True})
        start = time.monotonic()
        outcome: dict[str, Any] = {"check": check["name"], "passed": False}
        try:
            if not check["alone"]:
                _prepare(site)
            outcome["measured"] = _function(check["target"])(site)
            site.meet()
            outcome["passed"] = True
        except Exception as error:
            traceback.print_exc()
            outcome["why"] = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"
            outcome["rank"] = site.rank
        outcome["seconds"] = round(time.monotonic() - start, 2)
        if site.rank == 0 or not outcome["passed"]:
            add_event(events, outcome)
        if not outcome["passed"]:
            return 1
    return 0


def add_event(events: Path, event: Mapping[str, Any]) -> None:
    """Writes one line at once and whole, from any rank."""
    with events.open("ab", buffering=0) as file:
        file.write(json.dumps(event).encode() + b"\n")


def _function(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _prepare(site: Site) -> None:
    """Prepares like the command, before torch is imported; checks the device for a real run."""
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    import torch

    expect(site.toy or torch.cuda.is_available(), ABSENT_DEVICE)


def main() -> int:
    """Runs the task in the only argument, JSON with ``checks``, ``events``, ``folder``, ``toy`` and ``ranks``."""
    task = json.loads(sys.argv[1])
    site = Site(
        folder=Path(task["folder"]),
        toy=task["toy"],
        ranks=task["ranks"],
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
    )
    return run_checks(task["checks"], site, Path(task["events"]))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit, which would wait for threads that a failed check has left behind.
    os._exit(code)
