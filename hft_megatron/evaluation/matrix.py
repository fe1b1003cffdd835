"""The score matrix of a sequence of tasks: the model's score in each of them before the first and after each one.

The scores of continual learning are computed from it, all on the scale 0 to 100. R_{j,i} is the score in task i after
task j, R_{0,i} that of the base, T the number of tasks trained so far; a score with a missing cell is None.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.errors import UserError
from hft_megatron.evaluation.measures import DIVERGENCES, MEASURES

FORMAT = 1
"""Version of matrix.json."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the matrix."""

    name: str
    digest: str
    """Digest of the questions, such as ``Task.digest``."""
    measure: str
    """Headline measure: the name of one of MEASURES."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The score of one model in one column."""

    value: float | None
    """None where the measure is not finite."""
    examples: int
    counts: Mapping[str, int] = field(default_factory=dict)
    """Numbers of prompts and answers that were cut, left out or never ended, by name."""
    beside: Mapping[str, float | None] = field(default_factory=dict)
    """Values of the column's other measures."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The scores of continual learning after ``tasks`` tasks."""

    tasks: int
    """Number of tasks T."""
    op: float | None
    """Overall performance: 1/T sum_{i=1..T} R_{T,i} (TRACE, arXiv:2310.06762)."""
    bwt: float | None
    """Backward transfer as TRACE and HFT divide it: 1/T sum_{i=1..T} (R_{T,i} - R_{i,i}), whose last term is 0."""
    bwt_over_t_minus_1: float | None
    """The same sum divided by T - 1, as it was defined for GEM (Lopez-Paz and Ranzato 2017, arXiv:1706.08840)."""
    forgetting: Mapping[str, float | None]
    """By task: max_{j=i..T} R_{j,i} - R_{T,i}, so that only something learned can be forgotten."""
    forward_transfer: Mapping[str, float | None]
    """By task except the first: R_{i-1,i} - R_{0,i}, where tasks were evaluated before their training."""
    general_changes: Mapping[str, float | None]
    """By general column, in its own unit: after task T minus the base."""
    general_delta: float | None
    """Mean change of the general columns on the scale 0 to 100 (TRACE's general-ability delta)."""
    kl: Mapping[str, Mapping[str, float | None]]
    """By general text, where measured: KL(base || tuned) and KL(tuned || base) after task T, in nats per token."""


class ScoreMatrix:
    """Rows are models, the base (0) and the one after each task (1 to T); columns are tasks, and general tasks and
    texts that no task of the sequence trains."""

    def __init__(self, tasks: Sequence[Column], general: Sequence[Column] = ()) -> None:
        """Starts without cells. Raises UserError for a duplicate name, and for a task's measure on another scale."""
        self.tasks, self.general = tuple(tasks), tuple(general)
        self._cells: dict[tuple[int, str], Cell] = {}
        names = [column.name for column in self.columns]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the task {name} is used twice in the sequence or beside it; rename one of them.")
        for task in self.tasks:
            if not is_of_hundred(task.measure):
                raise UserError(
                    f"the task {task.name} has the measure {task.measure}, but a sequence's scores are averaged, so "
                    f"each must go from 0 to 100 with higher values better; choose one of "
                    f"{', '.join(filter(is_of_hundred, MEASURES))}, or evaluate the task beside the sequence."
                )

    @property
    def columns(self) -> tuple[Column, ...]:
        """Tasks and general columns."""
        return (*self.tasks, *self.general)

    @property
    def done(self) -> int:
        """The last task after which a cell exists; 0 with those of the base alone."""
        return max((after for after, _ in self._cells), default=0)

    def put(self, after: int, name: str, cell: Cell) -> None:
        """Adds the score of the model after ``after`` tasks in a column."""
        assert 0 <= after <= len(self.tasks), after
        assert any(column.name == name for column in self.columns), name
        self._cells[after, name] = cell

    def cell(self, after: int, name: str) -> Cell | None:
        """The cell, if it exists."""
        return self._cells.get((after, name))

    def summary(self) -> Summary:
        """Scores after the tasks that are done."""
        last, names = self.done, [task.name for task in self.tasks[: self.done]]
        changes = [self._less((last, name), (row, name)) for row, name in enumerate(names, start=1)]
        forward = enumerate(names[1:], start=1)
        general = {column.name: self._less((last, column.name), (0, column.name)) for column in self.general}
        return Summary(
            tasks=last,
            op=_mean([self._value(last, name) for name in names]),
            bwt=_mean(changes),
            bwt_over_t_minus_1=_mean(changes, len(names) - 1),
            forgetting={name: self._forgetting(row, name) for row, name in enumerate(names, start=1)},
            forward_transfer={name: self._less((row, name), (0, name)) for row, name in forward},
            general_changes=general,
            general_delta=_mean([general[column.name] for column in self.general if is_of_hundred(column.measure)]),
            kl={column.name: kl for column in self.general if (kl := self._kl(last, column.name))},
        )

    def _kl(self, after: int, name: str) -> dict[str, float | None]:
        cell = self.cell(after, name)
        beside = {} if cell is None else cell.beside
        return {measure: beside[measure] for measure in DIVERGENCES if measure in beside}

    def _value(self, after: int, name: str) -> float | None:
        cell = self.cell(after, name)
        return None if cell is None else cell.value

    def _less(self, one: tuple[int, str], other: tuple[int, str]) -> float | None:
        values = self._value(*one), self._value(*other)
        return None if values[0] is None or values[1] is None else values[0] - values[1]

    def _forgetting(self, learned: int, name: str) -> float | None:
        values = [self._value(after, name) for after in range(learned, self.done + 1)]
        known = [value for value in values if value is not None]
        return max(known) - known[-1] if len(known) == len(values) else None

    def contents(self) -> dict[str, Any]:
        """The matrix as JSON, with its summary."""
        rows = []
        for after in range(self.done + 1):
            cells = {column.name: self.cell(after, column.name) for column in self.columns}
            known = {name: asdict(cell) for name, cell in cells.items() if cell is not None}
            rows.append({"after": self.tasks[after - 1].name if after else None, "cells": known})
        return {
            "format": FORMAT,
            "tasks": [asdict(column) for column in self.tasks],
            "general": [asdict(column) for column in self.general],
            "rows": rows,
            "summary": asdict(self.summary()),
        }

    def write(self, path: Path) -> None:
        """Writes matrix.json atomically. Raises OSError."""
        write_atomically(path, json.dumps(self.contents(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "ScoreMatrix":
        """Reads the file of ``write``. Raises UserError where it cannot be read or is no matrix."""
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if contents["format"] != FORMAT:
                raise UserError(f"{path} has format {contents['format']!r}, but this version reads {FORMAT}; move it.")
            matrix = cls(*([Column(**column) for column in contents[kind]] for kind in ("tasks", "general")))
            names = [None, *(task.name for task in matrix.tasks)]
            for after, row in enumerate(contents["rows"]):
                if row["after"] != names[after]:
                    raise ValueError(f"row {after} is of {row['after']!r}")
                for name, cell in row["cells"].items():
                    matrix.put(after, name, Cell(**cell))
        except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError, AttributeError) as error:
            raise UserError(f"{path} is no score matrix ({error}); restore it, or delete it to start again.") from error
        return matrix

    def resumed(
        self, tasks: Sequence[Column], general: Sequence[Column], path: Path
    ) -> tuple["ScoreMatrix", tuple[str, ...]]:
        """This matrix, read from ``path``, with the columns of a command that resumes it, and notes for the log.

        A task with a row, and a general column with a cell, stay as they were. Later tasks may change, and the cells of
        tasks that no longer exist are dropped, which is noted. Raises UserError otherwise, and for fewer tasks.
        """
        if len(tasks) < len(self.tasks):
            raise UserError(
                f"the sequence has {len(tasks)} tasks, but that of {path} has {len(self.tasks)}; give them all, or "
                f"start again in another folder."
            )
        done = self.tasks[: self.done]
        for number, (held, wanted) in enumerate(zip(done, tasks, strict=False), start=1):
            _check_same(held, wanted, f"task {number} of {path}, which is done,")
        beside = {column.name: column for column in general}
        for held in self.general:
            if any(name == held.name for _, name in self._cells):
                _check_same(held, beside.get(held.name), f"the general task of {path}")
        matrix = ScoreMatrix(tasks, general)
        same, gone = set(self.columns) & set(matrix.columns), 0
        for (after, name), cell in self._cells.items():
            if any(column.name == name for column in same):
                matrix.put(after, name, cell)
            else:
                gone += 1
        notes = (f"cells of {path} left out, because their tasks have changed since: {gone}",) if gone else ()
        return matrix, notes


def is_of_hundred(measure: str) -> bool:
    """True if a measure goes from 0 to 100 and higher is better, as all of MEASURES do where higher is better."""
    return measure in MEASURES and MEASURES[measure].higher_is_better


def cell_of(values: Mapping[str, float], headline: str, examples: int, counts: Mapping[str, int]) -> Cell:
    """A cell from an evaluation's values by the names of measures."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    beside = {name: value for name, value in finite.items() if name != headline}
    return Cell(value=finite[headline], examples=examples, counts=dict(counts), beside=beside)


def _mean(values: Iterable[float | None], denominator: int | None = None) -> float | None:
    """Mean of all values, if they exist; with another ``denominator`` the sum divided by it."""
    known = list(values)
    count = len(known) if denominator is None else denominator
    if count < 1 or any(value is None for value in known):
        return None
    return math.fsum(value for value in known if value is not None) / count


def _check_same(held: Column, wanted: Column | None, which: str) -> None:
    if wanted == held:
        return
    if wanted is None or wanted.name != held.name:
        now = "no longer exists" if wanted is None else f"is {wanted.name} now"
        raise UserError(f"{which} was {held.name}, and {now}; restore it, or start again in another folder.")
    what = f"the measure {held.measure}" if wanted.measure != held.measure else "other settings or files"
    raise UserError(f"{which} was {held.name} with {what}; restore them, or start again in another folder.")
