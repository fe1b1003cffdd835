"""Docker's health check: a run is healthy while its log gets lines, at least one every HFT_HEALTH_SECONDS (3600).

The run's folder is SAVE, or --save of the command. Time counts from the start, since a run may load for long or
resume with an old log. A command without a folder is healthy while it lives.
"""

import os
import sys
import time
from pathlib import Path

import psutil


def save_folder(words: list[str], environment: dict[str, str]) -> str | None:
    """The last ``--save`` among ``words``, or SAVE."""
    folder = environment.get("SAVE") or None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--save":
            folder = following
        elif word.startswith("--save="):
            folder = word.removeprefix("--save=")
    return folder


def main() -> None:
    first = psutil.Process(1)
    last = first.create_time()
    folder = save_folder(first.cmdline(), dict(os.environ))
    if folder is None:
        return
    # With --stages every stage has a folder, and a log, of its own.
    logs = [*Path(folder).glob("metrics.jsonl"), *Path(folder).glob("*/metrics.jsonl")]
    last = max([last, *(log.stat().st_mtime for log in logs)])
    silent, limit = time.time() - last, float(os.environ.get("HFT_HEALTH_SECONDS", "3600"))
    if silent > limit:
        sys.exit(f"metrics.jsonl in {folder} got no line for {silent:.0f} s; HFT_HEALTH_SECONDS={limit:g}")


if __name__ == "__main__":
    main()
