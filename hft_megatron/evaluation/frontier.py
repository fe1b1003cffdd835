"""Forgetting at equal learning: compares the forgetting of methods that have learned the same.

At one learning rate a method that learns less forgets less, and seems better than it is. So the runs of each method,
at several learning rates, are read as curves of forgetting over learning, and compared at levels of learning.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hft_megatron.config.exports import BEST_METRICS
from hft_megatron.errors import UserError
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.tracking.tracker import FILE_NAME, ITERATION, OF_TASKS, OF_VALIDATION


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run: its learning and forgetting at each of its validations."""

    source: str
    """Name of the run, for people."""
    points: tuple[tuple[float, float], ...]
    """(learning, forgetting) in the order of steps; the second is the loss of ability, so that less is better."""
    higher_is_better: bool
    """True if a higher learning value is more learning, as of an accuracy; not of a loss."""
    is_change: bool
    """True if forgetting is the change since iteration 0; else it is the value itself."""
    left_out: int = 0
    """Validations whose values were not finite."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The least forgetting of every method at levels of learning."""

    levels: tuple[float, ...]
    forgetting: Mapping[str, tuple[float | None, ...]]
    """Forgetting by method, one value for each level; None where no run of it learned as much."""
    is_change: bool
    """The same as in ``Curve``."""
    notes: tuple[str, ...]
    """Lines about levels that weren't reached and validations that were left out."""


def frontier(curves: Mapping[str, Sequence[Curve]], levels: Sequence[float]) -> Frontier:
    """The lower envelope of each method's runs: the least forgetting with at least a level's learning.

    Between two validations of a run both values are interpolated linearly. Between runs nothing is interpolated, and
    beyond a method's best learning nothing is extrapolated. Raises UserError where some runs forget since iteration 0
    and others have no such record.
    """
    first = _check_alike(curves)
    notes = [
        f"{curve.source}: validations left out, because a value isn't finite: {curve.left_out}"
        for runs in curves.values()
        for curve in runs
        if curve.left_out
    ]
    if not first.is_change:
        notes.append("forgetting is the value itself, because no run has a record of iteration 0")
    forgetting = {method: tuple(_least(runs, level) for level in levels) for method, runs in curves.items()}
    for method, values in forgetting.items():
        missed = [f"{level:g}" for level, value in zip(levels, values, strict=True) if value is None]
        if missed:
            notes.append(
                f"{method}: learned no further than {_best(curves[method]):g}; left empty: {', '.join(missed)}"
            )
    return Frontier(levels=tuple(levels), forgetting=forgetting, is_change=first.is_change, notes=tuple(notes))


def shared_levels(curves: Mapping[str, Sequence[Curve]], count: int) -> tuple[float, ...]:
    """``count`` levels of learning in equal steps, from the runs' start up to the furthest that all methods reach.

    Raises UserError where a method's runs don't learn, and like ``frontier``.
    """
    sign = _sign(_check_alike(curves))
    start = sign * max(sign * curve.points[0][0] for runs in curves.values() for curve in runs)
    method, reached = min(((method, _best(runs)) for method, runs in curves.items()), key=lambda found: sign * found[1])
    if sign * reached <= sign * start:
        raise UserError(
            f"{method}: learned no further than {reached:g}, but a run begins at {start:g}: there is no level to "
            f"compare at; leave the method out or train it longer."
        )
    return tuple(start + (reached - start) * step / count for step in range(1, count + 1))


def _check_alike(curves: Mapping[str, Sequence[Curve]]) -> Curve:
    """One of the curves, which must all be of one kind. Raises UserError otherwise."""
    every = [curve for runs in curves.values() for curve in runs]
    assert all(curves.values()), "a method without runs"
    assert len({curve.higher_is_better for curve in every}) == 1, "curves over different measures"
    changes = [curve for curve in every if curve.is_change]
    others = [curve for curve in every if not curve.is_change]
    if changes and others:
        raise UserError(
            f"{others[0].source} has no record of iteration 0, which {changes[0].source} has: their forgetting cannot "
            f"be compared; run both with a validation before the first step."
        )
    return every[0]


def _sign(curve: Curve) -> int:
    """1, or -1 where less is more learning."""
    return 1 if curve.higher_is_better else -1


def _best(runs: Sequence[Curve]) -> float:
    sign = _sign(runs[0])
    return sign * max(sign * learning for curve in runs for learning, _ in curve.points)


def _least(runs: Sequence[Curve], level: float) -> float | None:
    sign = _sign(runs[0])
    found = []
    for curve in runs:
        # Measured from the level: a run at 0 or more has learned as much.
        points = [(sign * (learning - level), forgetting) for learning, forgetting in curve.points]
        found += [forgetting for learning, forgetting in points if learning >= 0]
        found += [
            before[1] + (after[1] - before[1]) * before[0] / (before[0] - after[0])
            for before, after in pairwise(points)
            if (before[0] < 0) != (after[0] < 0)
        ]
    return min(found, default=None)


def curve_of_run(folder: str, learning: str, forgetting: str) -> Curve:
    """The curve of the run that was saved to ``folder``, by two names of its metrics.jsonl, such as ``lm loss
    validation/NAME``; a point is an iteration that has both.

    Forgetting is the deterioration of the value since iteration 0, if that was recorded, or else the value itself.
    Raises UserError where the file or a name doesn't exist, where no iteration has both, and where it isn't known
    whether more of a name's value is better.
    """
    records = _records(Path(folder) / FILE_NAME)
    names = sorted({name for record in records.values() for name in record})
    for name in (learning, forgetting):
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=3)
            there = f"near it are {', '.join(nearest)}" if nearest else f"it has {', '.join(names)}"
            raise UserError(f"{folder}: no record of {FILE_NAME} has {name}; {there}.")
    sign, base = (-1 if _more_is_better(forgetting, folder) else 1), records.get(0, {}).get(forgetting)
    if base is None and sign < 0:
        raise UserError(
            f"{folder}: more of {forgetting} is better, so its forgetting needs a record of iteration 0; run "
            f"with a validation before the first step."
        )
    points = [
        (record[learning], sign * (record[forgetting] - (base or 0.0)))
        for record in records.values()
        if learning in record and forgetting in record
    ]
    finite = tuple(point for point in points if all(map(math.isfinite, point)))
    if not finite:
        raise UserError(f"{folder}: no iteration of {FILE_NAME} has finite values of both {learning} and {forgetting}.")
    return Curve(
        source=folder,
        points=finite,
        higher_is_better=_more_is_better(learning, folder),
        is_change=base is not None,
        left_out=len(points) - len(finite),
    )


def _more_is_better(name: str, folder: str) -> bool:
    """True if more is better. Raises UserError where neither a registered method nor a measure defines that."""
    known = {measure.name: measure.higher_is_better for measure in MEASURES.values()}
    for of_method in BEST_METRICS.values():
        known.update(of_method)
    measured = name.partition(OF_VALIDATION)[0]
    # A task may have the name of a measure: the part after its last slash is the measure.
    parts = [name.rpartition("/")[2]] if name.startswith(OF_TASKS) else [measured, *measured.split("/")]
    for part in parts:
        if part in known:
            return known[part]
    raise UserError(
        f"{folder}: it isn't known whether more of {name} is better; choose a value of one of "
        f"{', '.join(sorted(known))}."
    )


def _records(path: Path) -> dict[int, dict[str, float]]:
    """Numbers by name of every iteration, in order. Raises UserError with the line where there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give the --save folder of a run.") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a run is writing it, or was killed meanwhile
    records: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            iteration = int(record[ITERATION])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number} is not a record of a run ({error}); give the --save folder of one."
            ) from error
        numbers = {name: value for name, value in record.items() if type(value) in (int, float) and name != ITERATION}
        records.setdefault(iteration, {}).update(numbers)
    return dict(sorted(records.items()))
