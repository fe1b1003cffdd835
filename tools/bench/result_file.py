"""Common steps of every benchmark: figures are written to a committed file, and printed from there."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from launching import DemoError

Results = dict[str, Any]


def in_turn(ways: Iterable[str], pairs: int) -> Iterator[tuple[int, str]]:
    """(number from 1, way) of each run, in reverse order in every second pair, so that drift affects all."""
    order = tuple(ways)
    for pair in range(pairs):
        for way in order if pair % 2 == 0 else reversed(order):
            yield pair + 1, way


def measure_and_render(
    parser: argparse.ArgumentParser,
    file: Path,
    measure: Callable[[argparse.Namespace], Results],
    render: Callable[[Results], str],
    picture: Callable[[Results], str] | None = None,
) -> int:
    """Measure into ``file`` unless only the text is asked for, then print the text; returns the exit code.

    ``measure`` gets the options and raises DemoError when a run fails. ``picture`` makes an SVG beside the file.
    """
    parser.add_argument("--render", action="store_true", help="only print the text, from the result file")
    parser.add_argument("--output", type=Path, default=file, help="the result file (default: the committed one)")
    options = parser.parse_args()
    if not options.render:
        try:
            results = measure(options)
        except DemoError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            options.output.with_suffix(".svg").write_text(picture(results), encoding="utf-8")
    print(render(json.loads(options.output.read_text(encoding="utf-8"))))
    return 0
