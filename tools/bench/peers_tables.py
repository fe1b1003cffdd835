"""The result of ``peers.py`` as Markdown tables, and as a picture (SVG) of step times."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

BEFORE = "9d3f35c"
TARGETS: Sequence[tuple[str, str, Mapping[str, float]]] = (
    ("half", f"full at {BEFORE}", {"128": 0.42, "512": 0.62, "4 x 512": 0.80}),
    ("half", "DDP, the same frozen", {"128": 0.88, "512": 0.95, "4 x 512": 0.93}),
    ("half", "FSDP2, the same frozen", {"128": 0.60, "512": 0.80, "4 x 512": 0.95}),
    ("full", "DDP, full", {"128": 0.90, "512": 0.95, "4 x 512": 0.95}),
    ("full", "stock megatron-core, full", {"128": 0.60, "512": 0.75, "4 x 512": 0.90}),
)
"""Largest ratios of step times by work."""
USUAL_LAYOUT = "DP 2"
OTHER_LAYOUTS = ("TP 2", "TP 2 + SP", "PP 2")
PHASES = ("forward", "backward")
"""Phases of the trainers that report them, with the waits for tensor-parallel ranks."""
FIGURES = ("step (ms)", "processor (ms)", "wire (MB per rank)", "page faults", "peak resident (MB)")
BAR, LEFT, LINE = 260, 320, 22
"""Pixels of the longest bar, of the names, and of a line."""
OURS, THEIRS = "#2d7d6e", "#b9bec4"


def render(results: Mapping[str, Any]) -> str:
    """The result file as Markdown tables."""
    works = results["works"]
    lines = [f"| ratio of step times | {' | '.join(works)} |", f"|---|{'---|' * len(works)}"]
    targets = {f"{one} / {other}": limits for one, other, limits in TARGETS}
    for name, ratios in _ratios(works).items():
        cells = []
        for work in works:
            limit = f", target {targets[name][work]}" if name in targets else ""
            cells.append(f"{_words(ratios[work])[:-1]}{limit})" if work in ratios else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for work in works:
        columns = [*FIGURES, *(f"{one} (ms)" for one in PHASES)]
        lines += ["", f"| {work} tokens | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for name, figures in _trainers(works[work]).items():
            phases = figures.get("phases (ms)", {})
            cells = [f"{figures[one]:,.0f}" for one in FIGURES]
            cells += [f"{phases[one]:,.0f}" if one in phases else "-" for one in PHASES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


def _ratios(works: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Ratios by trainers and work, of the first set that has both."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for work, sets in works.items():
        for one in sets.values():
            for name, ratio in one["ratios"].items():
                found.setdefault(_at(name, one), {}).setdefault(work, ratio)
    return found


def _trainers(sets: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for one in sets.values():
        for name, figures in one["trainers"].items():
            found.setdefault(_at(name, one), figures)
    return found


def _at(name: str, one: Mapping[str, Any]) -> str:
    return name if one["layout"] == USUAL_LAYOUT else f"{name}, {one['layout']}"


def picture(results: Mapping[str, Any]) -> str:
    """Bars: the step time of each trainer in units of our half's, medians of ratios within rounds."""
    ratios = {name: found for name, found in _ratios(results["works"]).items() if name.startswith("half / ")}
    names = [name for name in ratios if not name.endswith(OTHER_LAYOUTS)]
    works = list(results["works"])
    times = {name: {work: 1 / one["median"] for work, one in ratios[name].items()} for name in names}
    longest = max([1.0, *(time for one in times.values() for time in one.values())])
    width = LEFT + len(works) * (BAR + 60)
    lines = [_text(LEFT + number * (BAR + 60), LINE, f"{work} tokens") for number, work in enumerate(works)]
    bars = {"half": dict.fromkeys(works, 1.0), **{name.removeprefix("half / "): one for name, one in times.items()}}
    for row, (name, one) in enumerate(bars.items(), start=2):
        lines.append(_text(8, row * LINE, name))
        colour = OURS if name.split(",")[0] in ("half", "full") else THEIRS
        for number, work in enumerate(works):
            if work in one:
                left, length = LEFT + number * (BAR + 60), one[work] / longest * BAR
                lines.append(
                    f'<rect x="{left}" y="{row * LINE - 12}" width="{length:.0f}" height="14" fill="{colour}"/>'
                )
                lines.append(_text(round(left + length) + 6, row * LINE, f"{one[work]:.2f}"))
    height = (len(bars) + 2) * LINE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *lines, "</svg>"]) + "\n"


def _text(x: int, y: int, words: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(words)}</text>'
