"""The results file: a JSON line per start of ``acceptance.py`` with its environment, and one per finished check."""

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from working_site import REPOSITORY

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "triton", "numpy", "tyro")
SAME_SETTING = ("card", "part", "ranks", "toy")
"""Fields that earlier results must share with a run that resumes from them."""


class WrongUse(Exception):
    """An error in the options; the message is a sentence."""


def what_it_runs_on(*, part: str, ranks: int, toy: bool, packages: Path) -> dict[str, Any]:
    """The header of a run. ``packages`` is the folder of the installed wheels, before this Python's own."""
    card, driver, memory = _card() if not toy else ("cpu", None, None)
    path = [str(packages), *sys.path]
    versions = {name: next(_versions(name, path), None) for name in PACKAGES}
    return {
        "header": True,
        "card": card,
        "driver": driver,
        "memory": memory,
        "part": part,
        "ranks": ranks,
        "toy": toy,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _versions(name: str, path: list[str]) -> Iterator[str]:
    return (found.version for found in metadata.distributions(name=name, path=path))


def _card() -> tuple[str, str | None, str | None]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        first = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "no card", None, None
    name, driver, memory = (text.strip() for text in first.split(","))
    return name, driver, memory


def _commit() -> str | None:
    """The commit; None for a copy of the files without git; with a plus where files differ from the commit."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def default_file(header: Mapping[str, Any]) -> Path:
    """``results/CARD-DATE.jsonl``."""
    card = re.sub(r"[^a-z0-9]+", "-", str(header["card"]).lower()).strip("-")
    return RESULTS / f"{card}-{header['date'][:10]}.jsonl"


@dataclass(kw_only=True)
class Results:
    """Outcomes of the checks so far, in memory and on disk."""

    file: Path
    header: Mapping[str, Any]
    by_name: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest outcome of each check: ``passed``, ``seconds``, ``measured`` or ``why``."""

    def begin(self) -> None:
        """Writes the header, below the existing content of the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write(self.header)

    def resume_from(self, file: Path) -> None:
        """Takes over the checks that passed in ``file`` on this card, part and ranks. Raises WrongUse for another
        file."""
        header: Mapping[str, Any] | None = None
        for line in _lines(file):
            if "header" in line:
                header = line
            elif header is not None and all(header.get(key) == self.header[key] for key in SAME_SETTING):
                self.by_name[line["check"]] = line
        if header is None:
            raise WrongUse(f"--resume {file} holds no results of acceptance.py.")
        for name in [name for name, line in self.by_name.items() if not line["passed"]]:
            del self.by_name[name]

    def add(self, outcome: Mapping[str, Any]) -> None:
        """Records a finished check, on disk before this returns, and shows the line."""
        line = {**outcome, "commit": self.header["commit"]}
        self.by_name[line["check"]] = line
        self._write(line)
        print(json.dumps(line), flush=True)

    def passed(self, name: str) -> bool:
        return bool(self.by_name.get(name, {}).get("passed"))

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    """The whole lines: an interrupted run may have left half of one at the end."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise WrongUse(f"--resume {file} cannot be read: {error}") from None
    for line in lines:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            yield found


def table(checks: Iterable[tuple[str, str]], results: Results) -> str:
    """A row per (name, title): passed or not, seconds, and the measurements or the reason of the failure."""
    rows = []
    for name, title in checks:
        line = results.by_name.get(name)
        if line is None:
            rows.append((name, title, "not run", "", ""))
            continue
        said = _in_words(line.get("measured")) if line["passed"] else str(line.get("why", ""))
        rows.append((name, title, "passed" if line["passed"] else "FAILED", f"{line['seconds']:.1f} s", said))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )


def _in_words(measured: Any) -> str:
    if not isinstance(measured, dict):
        return ""
    return ", ".join(f"{name} {_short(value)}" for name, value in measured.items() if not isinstance(value, dict))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
