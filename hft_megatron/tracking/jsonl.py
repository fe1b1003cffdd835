"""``metrics.jsonl`` in the save folder: the record of the run for machines, one JSON object per line."""

import contextlib
import json
import os
from pathlib import Path

from hft_megatron.errors import RunFailed, UserError
from hft_megatron.tracking.tracker import Metrics

FILE_NAME = "metrics.jsonl"
ITERATION = "iteration"


class JsonlTracker:
    """Appends each record as one object; floats are written so that they read back bit for bit.

    A loss that is not a number is written as ``NaN``, which Python reads back and strict JSON does not know.
    """

    def __init__(self, path: Path, *, start_iteration: int) -> None:
        """Open ``path`` for a run that goes on after ``start_iteration`` (0 for a fresh run).

        Lines of later iterations are dropped first: the run that wrote them died before its next checkpoint, and
        they come again. Raises ``UserError`` naming the line when the file is not a record of ours, and where it
        can't be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_lines_after(path, start_iteration)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error}; make room, or choose another --save folder.") from error

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line and hand it to the operating system, so that a killed run loses nothing.

        Raises RunFailed, on this rank alone, where it can't be written.
        """
        assert ITERATION not in metrics, "the iteration is the step, not a metric"
        try:
            self._file.write(json.dumps({ITERATION: step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFailed(f"iteration {step} can't be written to {self._path}: {error}") from error

    def close(self) -> None:
        """Close the file; ``log`` has said already what could not be written."""
        with contextlib.suppress(OSError):
            self._file.close()


def _drop_lines_after(path: Path, iteration: int) -> None:
    """Keep the lines up to ``iteration``; replace the file in one step, so that a kill here loses nothing."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a run was killed while it wrote
    kept = [line for number, line in enumerate(lines, 1) if _iteration_of(line, f"{path}:{number}") <= iteration]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _iteration_of(line: str, where: str) -> int:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); move the file away or choose another --save.") from error
    if not isinstance(record, dict) or not isinstance(record.get(ITERATION), int):
        raise UserError(f"{where} has no whole number `{ITERATION}`; move the file away or choose another --save.")
    return int(record[ITERATION])
