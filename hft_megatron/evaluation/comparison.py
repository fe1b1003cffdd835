"""Two models compared by their result files: the differences of every task, with intervals from the paired bootstrap.

A result file is ``results.json``, with the values of one or more models, and the JSON Lines file that it names, with
the statistics of every example. Neither a model nor a tokenizer is loaded.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hft_megatron.errors import UserError
from hft_megatron.evaluation.bootstrap import Interval, paired_difference
from hft_megatron.evaluation.measures import MEASURES, Measure
from hft_megatron.evaluation.results import FORMAT

FIX = "evaluate again"


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """One model's results of one task."""

    digest: str
    """Digest of the task's settings and files."""
    questions: str
    """Digest of the ids of the questions."""
    statistics: Mapping[str, Mapping[str, list[float]]]
    """Statistics by the example's place, then by the measure's name."""
    measures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelResults:
    """One model's results of all tasks."""

    source: str
    """The file and, where that holds several models, the model's name, in the user's notation."""
    tokenizer_digest: str
    tasks: Mapping[str, TaskResults]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two models' values of one measure of one task."""

    task: str
    measure: str
    first: float
    second: float
    interval: Interval
    """Interval of the second value minus the first."""
    better: Literal["first", "second"] | None
    """The better model; None where 0 lies in the interval."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences, in the order of the first file, and lines about everything that is not compared."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(first: str, second: str) -> Comparison:
    """Compare the models of two result files, each ``FILE`` or, where it holds several models, ``FILE:MODEL``.

    Raises UserError where files cannot be read or are damaged, where they have no comparable task or measure in common,
    and where a task of one name had other settings, files or examples.
    """
    one, other = read_results(first), read_results(second)
    both = [name for name in one.tasks if name in other.tasks]
    if not both:
        raise UserError(
            f"{one.source} and {other.source} have no task in common: the first has {', '.join(one.tasks) or 'none'}, "
            f"the second {', '.join(other.tasks) or 'none'}; evaluate both with the same --tasks."
        )
    notes = [
        f"{mine.source}: tasks that {theirs.source} doesn't have, left out: {', '.join(left_out)}"
        for mine, theirs in ((one, other), (other, one))
        if (left_out := [name for name in mine.tasks if name not in theirs.tasks])
    ]
    differences = []
    for name in both:
        _check_same(name, one, other)
        measures, of_task = _comparable(name, one, other)
        notes += of_task
        differences += [_difference(name, measure, one.tasks[name], other.tasks[name]) for measure in measures]
    if not differences:
        raise UserError(
            f"{one.source} and {other.source} have no measure that can be compared ({'; '.join(notes)}); evaluate both "
            f"with one that doesn't count tokens, such as bits_per_byte."
        )
    return Comparison(differences=tuple(differences), notes=tuple(notes))


def _check_same(name: str, one: ModelResults, other: ModelResults) -> None:
    mine, theirs = one.tasks[name], other.tasks[name]
    if mine.digest != theirs.digest:
        raise UserError(
            f"Task {name} of {one.source} differs from that of {other.source}: its settings or files have the digests "
            f"{mine.digest[:12]} and {theirs.digest[:12]}; evaluate both with the same --tasks and files."
        )
    if mine.statistics.keys() != theirs.statistics.keys():
        shared = len(mine.statistics.keys() & theirs.statistics.keys())
        raise UserError(
            f"Task {name} has {len(mine.statistics):,} examples in {one.source} and {len(theirs.statistics):,} in "
            f"{other.source}, {shared:,} of them the same; evaluate both on the same examples."
        )


def _comparable(name: str, one: ModelResults, other: ModelResults) -> tuple[list[Measure], list[str]]:
    """Measures of a task that both files have, and lines about those that cannot compare the models fairly."""
    shared = [measure for measure in one.tasks[name].measures if measure in other.tasks[name].measures]
    alone = [
        measure
        for mine, theirs in ((one, other), (other, one))
        for measure in mine.tasks[name].measures
        if measure not in theirs.tasks[name].measures
    ]
    unknown = [measure for measure in shared if measure not in MEASURES]
    known = [MEASURES[measure] for measure in shared if measure in MEASURES]
    same_tokens = one.tokenizer_digest == other.tokenizer_digest
    of_tokens = [measure.name for measure in known if measure.of_tokens and not same_tokens]
    if same_tokens and one.tasks[name].questions != other.tasks[name].questions:
        return [], [f"{name}: left out, because the models' contexts differ and they read other windows or prompts"]
    notes = [
        f"{name}: {', '.join(left_out)}: left out, because {reason}"
        for left_out, reason in (
            (of_tokens, "tokens are counted and the tokenizers differ"),
            (unknown, "this version doesn't know it"),
            (alone, "only one of the two files has it"),
        )
        if left_out
    ]
    return [measure for measure in known if measure.name not in of_tokens], notes


def _difference(task: str, measure: Measure, one: TaskResults, other: TaskResults) -> Difference:
    first = [statistics[measure.name] for statistics in one.statistics.values()]
    second = [other.statistics[place][measure.name] for place in one.statistics]
    interval = paired_difference(first, second, measure.total)
    better: Literal["first", "second"] | None = None
    if interval.low > 0 or interval.high < 0:
        better = "second" if (interval.low > 0) == measure.higher_is_better else "first"
    values = [measure.total([sum(column) for column in zip(*rows, strict=True)]) for rows in (first, second)]
    return Difference(
        task=task, measure=measure.name, first=values[0], second=values[1], interval=interval, better=better
    )


def read_results(source: str) -> ModelResults:
    """One model's results from ``FILE`` or ``FILE:MODEL``. Raises UserError like ``compare``."""
    path, wanted = _split(source)
    if path.endswith(".jsonl"):
        raise UserError(f"{path} has the predictions; name the .json file beside it, which has the values.")
    content = _object(_read(path), path)
    if "format" not in content:
        raise UserError(f"{path} is not a result file of `hft-megatron evaluate --tasks`; name one.")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has results format {content.get('format')}, this version reads {FORMAT}; {FIX}.")
    models = _by_name(_of(content, "models", list, path), path)
    if wanted is None and len(models) != 1:
        raise UserError(
            f"{path} holds {len(models)} models ({', '.join(models)}); choose one of them, as in {path}:"
            f"{next(iter(models), 'MODEL')}."
        )
    name = next(iter(models)) if wanted is None else wanted
    if name not in models:
        nearest = difflib.get_close_matches(name, models, n=1, cutoff=0)
        raise UserError(f"{source}: {path} holds no model {name}; the nearest is {', '.join(nearest) or 'none'}.")
    tasks = _by_name(_of(models[name], "tasks", list, path), path)
    lines = str(Path(path).parent / _of(content, "predictions", str, path))
    measures = {task: tuple(_of(entry, "values", dict, path)) for task, entry in tasks.items()}
    statistics = _statistics(lines, name, measures)
    for task, entry in tasks.items():
        told, found = _of(entry, "examples", int, path), len(statistics[task])
        if told != found:
            raise UserError(
                f"{lines} has {found:,} examples of task {task} by {name}, but {path} says {told:,}: it is truncated "
                f"or of another evaluation; {FIX}."
            )
    return ModelResults(
        source=source,
        tokenizer_digest=_of(models[name], "tokenizer_digest", str, path),
        tasks={
            task: TaskResults(
                digest=_of(entry, "digest", str, path),
                questions=_of(entry, "questions", str, path),
                statistics=statistics[task],
                measures=measures[task],
            )
            for task, entry in tasks.items()
        },
    )


def _split(source: str) -> tuple[str, str | None]:
    """The file and the model, either of which may have colons in its name."""
    ends = [len(source), *(place for place, letter in enumerate(source) if letter == ":")]
    end = next((end for end in ends if Path(source[:end]).is_file()), len(source))
    return source[:end], source[end + 1 :] or None


def _by_name(entries: list[Any], path: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = _of(entry, "name", str, path)
        if name in found:
            raise UserError(f"{path} lists {name} twice; {FIX}.")
        found[name] = entry
    return found


def _statistics(
    path: str, model: str, measures: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """One model's statistics by task, example and measure. Raises UserError with the line where the file is damaged."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {task: {} for task in measures}
    lengths: dict[tuple[str, str], int] = {}
    for where, record in _lines(path):
        task, place = _of(record, "task", str, where), _of(record, "example", str, where)
        given = _of(record, "statistics", dict, where)
        if _of(record, "model", str, where) != model or task not in measures:
            continue
        if place in found[task]:
            raise UserError(f"{where} has example {place} of task {task} a second time; {FIX}.")
        for measure in measures[task]:
            numbers = _of(given, measure, list, where)
            is_whole = len(numbers) == lengths.setdefault((task, measure), len(numbers))
            if not (numbers and is_whole and all(type(number) in (int, float) for number in numbers)):
                raise UserError(f"{where} has other statistics of {measure} than the lines before; {FIX}.")
        found[task][place] = {measure: given[measure] for measure in measures[task]}
    return found


def _lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a JSON Lines file, with their places."""
    for number, line in enumerate(_read(path).splitlines(), 1):
        where = f"{path}:{number}"
        yield where, _object(line, where)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a file that hft-megatron evaluate wrote."
        ) from None


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}{line} is not JSON ({error.msg}): the file is truncated or damaged; {FIX}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.reason}): the file is damaged; {FIX}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object; give a file that hft-megatron evaluate wrote.")
    return value


def _of(record: Any, name: str, kind: type, where: str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not kind:
        raise UserError(f"{where} has no `{name}` that is a {kind.__name__}: it is damaged or no results file; {FIX}.")
    return value
