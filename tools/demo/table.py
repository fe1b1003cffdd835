"""The demo's table, the same for one seed on a terminal and for several in the README."""

from collections.abc import Callable, Sequence

import settings
from comparison import METHODS, Evaluation, Outcome

MEGABYTE = 1e6
README_START = "<!-- demo-table -->"
README_END = "<!-- /demo-table -->"


def render(before: Evaluation, outcomes: Sequence[Outcome]) -> str:
    """A Markdown table of means over seeds, with the range in brackets; ``before`` is the pretrained model."""
    of_method = {method.name: [one for one in outcomes if one.method == method.name] for method in METHODS}
    steps = settings.FINE_TUNING_STEPS
    lines = [["", "before", *of_method]]

    def add(label: str, at_first: str, value: Callable[[Outcome], float | None], form: Callable[[float], str]) -> None:
        lines.append([label, at_first, *(_spread([value(one) for one in some], form) for some in of_method.values())])

    new, old = _percent(before.new_task), _percent(before.old_knowledge)
    add(f"new task after {steps} steps", new, lambda one: one.at_equal_steps.new_task, _percent)
    add(f"old knowledge after {steps} steps", old, lambda one: one.at_equal_steps.old_knowledge, _percent)
    enough = f"{settings.ENOUGH:.0%}".replace("%", " %")
    add(f"steps until the new task is at {enough}", "", _at_skill(lambda one: one.step), _plain)
    add("new task then", new, _at_skill(lambda one: one.new_task), _percent)
    add("old knowledge then", old, _at_skill(lambda one: one.old_knowledge), _percent)
    add("step time, TP 2 (ms)", "", lambda one: one.step_ms, _plain)
    add("optimizer state per rank, TP 2 (MB)", "", lambda one: one.optimizer_bytes / MEGABYTE, _tenths)
    add("gradient buffer per rank, TP 2 (MB)", "", lambda one: one.gradient_bytes / MEGABYTE, _tenths)
    add("sent per rank and step, TP 2 x DP 2 (MB)", "", lambda one: one.wire_bytes / MEGABYTE, _tenths)
    return aligned(lines)


def replace_table(text: str, table: str, start: str = README_START, end: str = README_END) -> str:
    """The text of a document, the README, with ``table`` between its two marks."""
    head, found, rest = text.partition(start)
    _, found_end, tail = rest.partition(end)
    assert all((found, found_end)), f"no place between {start} and {end}"
    return f"{head}{start}\n{table}\n{end}{tail}"


def _at_skill(value: Callable[..., float]) -> Callable[[Outcome], float | None]:
    return lambda one: None if one.at_equal_skill is None else value(one.at_equal_skill)


def _spread(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    mean = form(sum(known) / len(known))
    missing = "" if len(known) == len(values) else f", {len(values) - len(known)} not reached"
    if len(values) == 1 or form(min(known)) == form(max(known)):
        return f"{mean}{missing}"
    return f"{mean} ({form(min(known))} to {form(max(known))}{missing})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:.0f}"


def _tenths(value: float) -> str:
    return f"{value:.1f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of ``lines``, the first of which is its head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])
