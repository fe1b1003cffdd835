"""Text of the results of an evaluation for a terminal."""

from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any

from hft_megatron.evaluation.bootstrap import Interval, interval, paired_difference
from hft_megatron.evaluation.comparison import Comparison
from hft_megatron.evaluation.frontier import Frontier
from hft_megatron.evaluation.measures import AGAINST_BASE, MEASURES
from hft_megatron.report.tables import table_lines

Records = Sequence[Mapping[str, Any]]


def results_text(models: Sequence[Mapping[str, Any]], records: Mapping[tuple[str, str], Records]) -> str:
    """The values of all models, as in a result file, and the difference of every later model from the first.

    ``records`` are the examples by model and task. Intervals are 95 %, by resampling examples.
    """
    first = models[0]
    rows = [["task", "measure", "model", "value", *([f"less {first['name']}"] if len(models) > 1 else [])]]
    for task in first["tasks"]:
        for name in task["values"]:
            measure = MEASURES[name]
            of_first = _statistics(records[first["name"], task["name"]], name)
            for model in models:
                of_model = _statistics(records[model["name"], task["name"]], name)
                cells = ["", "", model["name"], in_words(interval(of_model, measure.total))]
                if model is first:
                    cells[:2] = [task["name"], _with_unit(name)]
                elif name in AGAINST_BASE:
                    pass  # is a difference already
                elif _places(records[first["name"], task["name"]]) != _places(records[model["name"], task["name"]]):
                    cells.append("other examples")
                elif measure.of_tokens and model["tokenizer_digest"] != first["tokenizer_digest"]:
                    cells.append("other tokens")
                elif _are_cut_otherwise(first, model, task["name"]):
                    cells.append("other windows")
                else:
                    cells.append(in_words(paired_difference(of_first, of_model, measure.total)))
                rows.append(cells)
    lines = [] if len(rows) == 1 else [*table_lines(rows, left=3), f"  {_ABOUT_INTERVALS}"]
    lines += [f"  {line}" for model in models for line in (*_counts(model), *_weights(model))]
    return "\n".join(lines)


_ABOUT_INTERVALS = "in brackets: 95 % intervals, by resampling examples (paired for differences)"


def _with_unit(name: str) -> str:
    unit = MEASURES[name].unit if name in MEASURES else ""
    return f"{name} ({unit})" if unit else name


def _weights(model: Mapping[str, Any]) -> list[str]:
    """The change of a model's weights from its base, where it was measured."""
    if "weight_changes" not in model:
        return []
    changes = model["weight_changes"]
    relative = "an undefined share" if changes["relative"] is None else f"{changes['relative']:.4g}"
    share = f"{100 * changes['changed_share']:.4g} %"
    return [f"{model['name']}: {share} of the parameters differ from the base's, by {relative} of their norm"]


def _are_cut_otherwise(first: Mapping[str, Any], model: Mapping[str, Any], task: str) -> bool:
    """Return whether two models of one tokenizer read different windows or ends of prompts, by their contexts."""
    asked = {next(one["questions"] for one in each["tasks"] if one["name"] == task) for each in (first, model)}
    return len(asked) > 1 and bool(model["tokenizer_digest"] == first["tokenizer_digest"])


def _statistics(records: Records, name: str) -> list[Sequence[float]]:
    return [record["statistics"][name] for record in records]


def _places(records: Records) -> list[str]:
    return [record["example"] for record in records]


def in_words(interval: Interval) -> str:
    """A value and its bounds."""
    if isinf(interval.low) and isinf(interval.high):
        return f"{interval.value:.4g} (one example)"
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _counts(model: Mapping[str, Any]) -> list[str]:
    """Lines about examples that were cut or left out, and answers that never ended."""
    lines = []
    for task in model["tasks"]:
        if any(task["counts"].values()):
            lines.append(f"{model['name']}, {task['name']}: {counted(task['counts'], task['examples'])}")
    return lines


def counted(counts: Mapping[str, int], examples: int) -> str:
    """The counts in words, of a number of examples."""
    found = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count)
    return f"{found}, of {examples:,} examples"


def comparison_text(comparison: Comparison) -> str:
    """The differences of two result files' models."""
    rows = [["task", "measure", "first", "second", "second - first", "better"]]
    for difference in comparison.differences:
        values = [f"{difference.first:.4g}", f"{difference.second:.4g}", in_words(difference.interval)]
        rows.append([difference.task, _with_unit(difference.measure), *values, difference.better or "neither"])
    notes = [_ABOUT_INTERVALS, *comparison.notes]
    return "\n".join([*table_lines(rows, left=2), *(f"  {note}" for note in notes)])


def frontier_text(frontier: Frontier, learning: str, forgetting: str) -> str:
    """The least forgetting of every method at levels of learning, and its definition."""
    kind = "change since iteration 0" if frontier.is_change else "value"
    about = (
        f"least {kind} of {forgetting} among the validations of a method's runs that have learned at least as much, "
        f"interpolated along each run; less is better"
    )
    rows = [[learning, *frontier.forgetting]]
    for number, level in enumerate(frontier.levels):
        values = [of_method[number] for of_method in frontier.forgetting.values()]
        rows.append([f"{level:.4g}", *("-" if value is None else f"{value:.4g}" for value in values)])
    return "\n".join([*table_lines(rows), *(f"  {note}" for note in (about, *frontier.notes))])
