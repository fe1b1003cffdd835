"""How the results of an evaluation look on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from hft_megatron.evaluation.bootstrap import Interval, interval, paired_difference
from hft_megatron.evaluation.comparison import Comparison
from hft_megatron.evaluation.frontier import Frontier
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.report.tables import table_lines

Records = Sequence[Mapping[str, Any]]


def results_text(models: Sequence[Mapping[str, Any]], records: Mapping[tuple[str, str], Records]) -> str:
    """The values of all models, which are those of a result file, and how every later one differs from the first.

    ``records`` are the examples by model and task. Intervals are 95 %, by resampling examples.
    """
    first = models[0]
    header = ["task", "measure", "model", "value", *([f"- {first['name']}"] if len(models) > 1 else [])]
    rows = [header]
    for task in first["tasks"]:
        for name in task["values"]:
            measure = MEASURES[name]
            of_first = _statistics(records[first["name"], task["name"]], name)
            for model in models:
                of_model = _statistics(records[model["name"], task["name"]], name)
                cells = ["", "", model["name"], in_words(interval(of_model, measure.total))]
                if model is first:
                    cells[:2] = [task["name"], f"{name} ({measure.unit})" if measure.unit else name]
                elif _places(records[first["name"], task["name"]]) != _places(records[model["name"], task["name"]]):
                    cells.append("other examples")
                elif measure.of_tokens and model["tokenizer_digest"] != first["tokenizer_digest"]:
                    cells.append("other tokens")
                else:
                    cells.append(in_words(paired_difference(of_first, of_model, measure.total)))
                rows.append(cells)
    if len(rows) == 1:
        return ""  # weights alone were compared, which the log has
    lines = list(table_lines(rows, left=3))
    lines += [f"  {line}" for model in models for line in _counts(model)]
    return "\n".join([*lines, "  in brackets: 95 % intervals, by resampling examples (paired for differences)"])


def _statistics(records: Records, name: str) -> list[Sequence[float]]:
    return [record["statistics"][name] for record in records]


def _places(records: Records) -> list[str]:
    return [record["example"] for record in records]


def in_words(interval: Interval) -> str:
    """A value and its bounds."""
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _counts(model: Mapping[str, Any]) -> list[str]:
    """Lines about what was cut, left out or never ended."""
    lines = []
    for task in model["tasks"]:
        counts = [f"{name.replace('_', ' ')} {count:,}" for name, count in task["counts"].items() if count]
        if counts:
            lines.append(f"{model['name']}, {task['name']}: {', '.join(counts)}, of {task['examples']:,} examples")
    return lines


def comparison_text(comparison: Comparison) -> str:
    """The differences of two result files' models."""
    rows = [["task", "measure", "first", "second", "second - first", "better"]]
    for difference in comparison.differences:
        values = [f"{difference.first:.4g}", f"{difference.second:.4g}", in_words(difference.interval)]
        rows.append([difference.task, difference.measure, *values, difference.better or "neither"])
    return "\n".join([*table_lines(rows, left=2), *(f"  {note}" for note in comparison.notes)])


def frontier_text(frontier: Frontier, learning: str) -> str:
    """The least forgetting of every method at levels of learning."""
    rows = [[learning, *frontier.forgetting]]
    for number, level in enumerate(frontier.levels):
        values = [of_method[number] for of_method in frontier.forgetting.values()]
        rows.append([f"{level:.4g}", *("-" if value is None else f"{value:.4g}" for value in values)])
    return "\n".join([*table_lines(rows), *(f"  {note}" for note in frontier.notes)])
