"""The acceptance run on a GPU: every check with a limit of its own, a JSON line for each at once, a table at the end.

Run: ``python tools/gpu/acceptance.py --part correctness`` and ``--part speed``, each under seven minutes on one card;
``--ranks 2`` runs the correctness part on two. ``--toy`` runs the same code on CPU. Exit code 0 only if all passed.
README.md beside this file says what each check asserts.

This process imports neither torch nor the product: a worker may crash, hang or run out of memory, and is then
killed with all its processes, and the remaining checks continue in a new one.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from check_list import CORRECTNESS, SPEED, Check, checks_of
from result_lines import Results, WrongUse, default_file, table, what_it_runs_on
from working_site import REPOSITORY

HERE = Path(__file__).resolve().parent
INSTALLED = HERE / "installed"
"""Folder for the wheels of check 0: the machine's own packages stay as they are."""
START_S = 60.0
"""Time-out for a worker to begin its first check."""
TOY_PATIENCE = 8
"""Factor on the limits of toys, which run beside other work; no speed is asserted of them."""
PAUSE_S = 0.05
LAST_LINES = 25
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""cuBLAS reads it once, and the deterministic checks are not a worker's first."""


class Acceptance:
    """One run of this program: starts workers, and records the outcome of each check."""

    def __init__(self, results: Results, folder: Path, *, ranks: int = 1, toy: bool = False) -> None:
        """``folder`` is for the files of checks and workers."""
        self._results, self._folder, self._ranks, self._toy = results, folder, ranks, toy
        self._workers = 0

    def run(self, checks: Sequence[Check]) -> None:
        """Runs the checks in order, each to its end or its limit."""
        waiting = list(checks)
        while waiting:
            together = 1
            while not waiting[0].alone and together < len(waiting) and not waiting[together].alone:
                together += 1
            finished = self._work(waiting[:together])
            waiting = waiting[finished:]

    def _work(self, checks: Sequence[Check]) -> int:
        """One worker's life; returns how many of the checks have an outcome now, at least one."""
        self._workers += 1
        events = self._folder / f"events-{self._workers}"
        log = self._folder / f"log-{self._workers}"
        events.touch()
        finished, began = 0, time.monotonic()
        limit, has_begun = self._limit(START_S), False
        with self._worker(checks, events, log) as process, events.open("rb") as new:
            while finished < len(checks):
                # Before the look at the events: a worker that has ended has written all of them.
                code = process.poll()
                for event in _whole_lines(new):
                    if event.get("began"):
                        began, limit, has_begun = time.monotonic(), self._limit(checks[finished].limit_s), True
                        continue
                    self._note(event, log)
                    finished, has_begun = finished + 1, False
                    if not event["passed"]:
                        return finished
                    began, limit = time.monotonic(), self._limit(START_S)
                if finished == len(checks):
                    break
                took = time.monotonic() - began
                why = None
                if code is not None:
                    why = f"the worker ended with exit code {code}"
                elif took > limit:
                    why = f"not finished after its limit of {limit:g} s" if has_begun else "the worker did not begin it"
                if why is not None:
                    outcome = {"check": checks[finished].name, "passed": False, "why": why, "seconds": round(took, 2)}
                    self._note(outcome, log)
                    return finished + 1
                time.sleep(PAUSE_S)
        return finished

    def _limit(self, seconds: float) -> float:
        return seconds * TOY_PATIENCE if self._toy else seconds

    def _note(self, outcome: Mapping[str, Any], log: Path) -> None:
        if outcome["passed"]:
            self._results.add(outcome)
            return
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        self._results.add({**outcome, "log": said})

    @contextlib.contextmanager
    def _worker(self, checks: Sequence[Check], events: Path, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
        folder = self._folder / f"worker-{self._workers}"
        folder.mkdir()
        task = {"checks": [asdict(check) for check in checks], "events": str(events), "folder": str(folder)}
        several = self._ranks > 1 and not checks[0].alone
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._ranks)]
        words = [*(launcher if several else []), str(HERE / "check_worker.py")]
        words.append(json.dumps(task | {"toy": self._toy, "ranks": self._ranks}))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=REPOSITORY,
                env=environment(toy=self._toy),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PAUSE_S)
        finally:
            _kill_family(process)


def environment(*, toy: bool) -> dict[str, str]:
    """Environment of every program that needs the product."""
    path = [str(INSTALLED), str(REPOSITORY), str(HERE), os.environ.get("PYTHONPATH", "")]
    changes = {**DETERMINISTIC, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    if toy:
        changes |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changes}


def _whole_lines(file: Any) -> Iterator[dict[str, Any]]:
    """Whole lines added since the last call; half a line is left for the next one."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield json.loads(line)


def _kill_family(process: "subprocess.Popen[bytes]") -> None:
    """Kills the worker's processes too: torchrun gives each rank a session of its own, and all others share one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for member in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    # Processes left behind by a worker that has ended by itself.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if all checks have passed, 1 if not, 2 for an error in the options."""
    # Its workers live in sessions of their own, and must not outlive it.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _run(_options(argv))
    except WrongUse as mistake:
        print(f"acceptance.py: {mistake}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    if options.write_reference:
        return subprocess.call([sys.executable, str(HERE / "check_losses.py")], env=environment(toy=True))
    known = checks_of(options.part, options.ranks)
    unknown = set(options.only) - {check.name for check in known}
    if unknown:
        raise WrongUse(f"--only {min(unknown)} is not one of {', '.join(check.name for check in known)}.")
    chosen = [check for check in known if not options.only or check.name in options.only]
    header = what_it_runs_on(part=options.part, ranks=options.ranks, toy=options.toy, packages=INSTALLED)
    file = options.output or options.resume or default_file(header)
    results = Results(file=file, header=header)
    if options.resume is not None:
        results.resume_from(options.resume)
    results.begin()
    with tempfile.TemporaryDirectory(prefix="acceptance-") as folder:
        run = Acceptance(results, Path(folder), ranks=options.ranks, toy=options.toy)
        run.run([check for check in chosen if not results.passed(check.name)])
    print(table([(check.name, check.title) for check in chosen], results))
    print(f"results: {file}")
    return 0 if all(results.passed(check.name) for check in chosen) else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether this trainer works and is fast on the card that is here.")
    parser.add_argument("--part", choices=(CORRECTNESS, SPEED), default=CORRECTNESS, help="default: correctness")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="these checks, by name, and no others")
    parser.add_argument("--ranks", type=int, default=1, help="cards of this machine; with several, correctness only")
    parser.add_argument("--toy", action="store_true", help="on CPU, with small shapes and no floors for speed")
    parser.add_argument("--output", type=Path, help="results file (default: tools/gpu/results/CARD-DATE.jsonl)")
    parser.add_argument("--resume", type=Path, metavar="RESULTS", help="skip what has passed in this results file")
    parser.add_argument("--write-reference", action="store_true", help="make reference.json anew, on CPU")
    options = parser.parse_args(argv)
    if options.ranks < 1 or (options.ranks > 1 and options.part == SPEED):
        raise WrongUse(f"--ranks {options.ranks} must be at least 1, and 1 for --part speed.")
    return options


if __name__ == "__main__":
    sys.exit(main())
