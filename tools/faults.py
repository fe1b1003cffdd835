"""A table of planted faults: the tests that notice when the product is broken on purpose, and their tier.

Run: ``python tools/faults.py --output table.md``, with ``--at COMMIT`` to try another commit with its own tests. Every
patch of ``tests/faults`` is one fault, below a few lines that describe it. One after the other is applied to a copy of
the commit, where pytest runs until a test fails: the quick tests of the part, then all quick tests, then the slow tests
of the part, then all slow ones. A fault that no test notices is missed.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
FAULTS = REPOSITORY / "tests" / "faults"
FAULTS_TEST = "tests/tools/test_faults_tool.py"
"""Test that would fail under every fault, whose patch cannot be applied a second time."""
HEADER = ("Subject", "Part", "Token", "Tests")
QUICK, SLOW, MISSED = "quick", "slow", "missed"
MARKERS = {QUICK: "not slow and not system", SLOW: "slow and not system"}
SILENCE_S = 20 * 60
"""Limit of a single test, which otherwise counts as hung and noticed. All slow tests take most of an hour."""
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?::\S+?(?:\[.*?\])?|\S+?)(?: - .*)?$", re.MULTILINE)
_IMPORT_FAILED = re.compile(r"^E +(ImportError|ModuleNotFoundError)\b", re.MULTILINE)


class FaultError(Exception):
    """An error in the table's files or options; the message is a sentence."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault."""

    name: str
    subject: str
    """The error, as a sentence."""
    part: str
    one_token: bool
    """True if the patch changes a single token of an expression."""
    tests: tuple[str, ...]
    """Files and folders of tests about the part."""
    patch: Path


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result for one fault."""

    fault: Fault
    tier: str
    test: str
    """The first test that failed or hung; empty without one."""
    seconds: float


def read_fault(path: Path) -> Fault:
    """Read a patch's header. Raises FaultError for an invalid one."""
    lines = path.read_text(encoding="utf-8").splitlines()[: len(HEADER)]
    pairs = [line.partition(": ")[::2] for line in lines]
    if [word for word, _ in pairs] != list(HEADER) or not all(text for _, text in pairs):
        raise FaultError(f"{path} must begin with the lines {', '.join(f'{word}:' for word in HEADER)}.")
    subject, part, token, tests = (text for _, text in pairs)
    if token not in ("yes", "no"):
        raise FaultError(f"{path} has `Token: {token}`, which must be yes or no.")
    listed = tuple(tests.split())
    return Fault(name=path.stem, subject=subject, part=part, one_token=token == "yes", tests=listed, patch=path)


def read_faults(folder: Path, names: Sequence[str]) -> list[Fault]:
    """Faults of these names, or all of a folder where none are given. Raises FaultError for an unknown name."""
    faults = [read_fault(path) for path in sorted(folder.glob("*.patch"))]
    unknown = set(names) - {fault.name for fault in faults}
    if unknown:
        raise FaultError(f"There is no fault {min(unknown)} in {folder}.")
    return [fault for fault in faults if not names or fault.name in names]


def git(*words: str, folder: Path) -> str:
    """Output of a git command. Raises FaultError with git's message where it fails."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise FaultError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A copy of ``commit`` in a temporary folder, which is always removed."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit, folder=REPOSITORY)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), folder=REPOSITORY)


@contextlib.contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """Plants the fault in the tree within the context. Raises FaultError for a patch that does not apply."""
    try:
        # By the blobs that it names, so that moved lines don't matter.
        git("apply", "--3way", str(fault.patch), folder=tree)
        yield
    finally:
        git("reset", "--quiet", "--hard", folder=tree)
        # Ignored files too: bytecode of the fault may look newer than the restored file.
        git("clean", "-qfdx", folder=tree)


def environment(tree: Path) -> Mapping[str, str]:
    """Variables for pytest: the tree's code is imported, and data beside this checkout is found from the tree too."""
    shared = f"{REPOSITORY.parent}/shared"
    found = {"HFT_TEST_DATA": f"{shared}/data", "HFT_TEST_CRDS": f"{shared}/k8s"}
    return found | os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}


def run_pytest(tree: Path, words: Sequence[str], log: Path, silence_s: float) -> int | None:
    """Exit code of pytest, which stops at the first failure; None where ``log`` got no line in ``silence_s``."""
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", f"--basetemp={log.parent / 'tmp'}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *words], cwd=tree, env=environment(tree), stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None and time.time() - log.stat().st_mtime < silence_s:
                time.sleep(0.1)
            return process.poll()
        finally:
            if process.poll() is None:
                end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """Kill a process and all that it started: ranks have sessions of their own, out of reach of its group's signals."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def first_caught(code: int | None, said: str) -> str | None:
    """The test that failed or hung in a run of pytest, None where all passed.

    Raises RuntimeError where pytest ended for another reason than a failing test.
    """
    if code in (0, 5):  # 5: none was selected
        return None
    if code is None:
        started = [line for line in said.splitlines() if "::" in line] or ["collection"]
        return f"{started[-1].strip()} (a test hung)"
    failed = _FAILED.findall(said.rpartition("short test summary info")[2])
    if failed and (code == 1 or (code == 2 and _IMPORT_FAILED.search(said))):
        return str(failed[0])
    raise RuntimeError(f"pytest ended with {code}:\n{said[-4000:]}")


def selections(tests: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Tier and pytest's words of each run, in order. A fault counts as slow once every quick test has passed."""
    others = [f"--ignore={path}" for path in (*tests, FAULTS_TEST)]
    for tier, marker in MARKERS.items():
        if tests:
            yield tier, ["-m", marker, *tests]
        yield tier, ["-m", marker, *others]


def try_fault(fault: Fault, tree: Path) -> Result:
    """Run tests under a planted fault until one fails."""
    start = time.monotonic()
    tests = [path for path in fault.tests if (tree / path).exists()]
    for path in sorted(set(fault.tests) - set(tests)):
        print(f"{fault.name}: {path} does not exist at this commit, and is skipped", flush=True)
    log = tree.parent / "pytest.log"
    with planted(fault, tree):
        for tier, words in selections(tests):
            code = run_pytest(tree, words, log, SILENCE_S)
            test = first_caught(code, log.read_text(encoding="utf-8", errors="replace"))
            if test is not None:
                return Result(fault=fault, tier=tier, test=test, seconds=time.monotonic() - start)
    return Result(fault=fault, tier=MISSED, test="", seconds=time.monotonic() - start)


def table(results: Sequence[Result], faults: int, commit: str) -> str:
    """The results so far as Markdown."""
    counts = {tier: sum(result.tier == tier for result in results) for tier in (QUICK, SLOW, MISSED)}
    lines = [
        f"# Planted faults at commit {commit}\n",
        f"{len(results)} of {faults} faults tried on {os.cpu_count()} cores by `python tools/faults.py`: "
        f"{counts[QUICK]} caught by the quick tests, {counts[SLOW]} by the slow tests, {counts[MISSED]} missed.\n",
        "| Fault | Part | One token | Caught by | Test | Seconds |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        fault, test = result.fault, result.test.replace("|", "\\|")
        words = [fault.name, fault.part, "yes" if fault.one_token else "no", result.tier, f"`{test}`" if test else ""]
        lines.append(f"| {' | '.join(words)} | {result.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def try_faults(faults: Sequence[Fault], commit: str, output: Path | None) -> None:
    """Try one fault after the other; every one rewrites ``output``, so that a stop loses nothing."""
    results: list[Result] = []
    with worktree(commit) as tree:
        exact = git("rev-parse", "--short=12", "HEAD", folder=tree)
        for fault in faults:  # before the first test, which may be hours before the last
            with planted(fault, tree):
                pass
        for fault in faults:
            result = try_fault(fault, tree)
            results.append(result)
            word = f"{fault.part}, {'one token' if fault.one_token else 'several tokens'}"
            print(f"{fault.name} ({word}): {result.tier} {result.test} after {result.seconds:.0f} s", flush=True)
            if output is not None:
                output.write_text(table(results, len(faults), exact), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 for a whole table, 2 for a patch that does not apply or an option that is wrong."""
    parser = argparse.ArgumentParser(description="Plant one fault after the other, and say which test notices it.")
    parser.add_argument("--at", metavar="COMMIT", default="HEAD", help="commit to try (%(default)s)")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="faults to try; all when left out")
    parser.add_argument("--output", metavar="FILE", type=Path, help="Markdown table to write")
    options = parser.parse_args(argv)
    # As an exception, so that a stop by a signal ends the tests and removes the copy too.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        try_faults(read_faults(FAULTS, options.only), options.at, options.output)
        return 0
    except FaultError as error:
        print(f"faults.py: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
