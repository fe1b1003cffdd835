"""A score matrix for people: as a table and as a picture, from the plain contents of matrix.json."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from hft_megatron.evaluation.matrix import is_of_hundred
from hft_megatron.report.evaluation import counted
from hft_megatron.report.plan_picture import FROZEN, INK, MARGIN, PAPER, ROUND_COLOURS, Box, Colour, fill
from hft_megatron.report.tables import table_lines

Contents = Mapping[str, Any]
"""Contents of a score matrix, from ``ScoreMatrix.contents``."""

CELL_HEIGHT = 24
PADDING = 8
"""Pixels left and right of the longest word of a column."""
GENERAL_GAP = 14
FULL: Colour = ROUND_COLOURS[0]
"""Colour of a score of 100; 0 is white."""
NOT_EVALUATED = "-"
NO_NUMBER = "no number"


def matrix_text(contents: Contents, *, trained_share: float | None = None) -> str:
    """The matrix, the loss of each task, and the scores of the sequence.

    ``trained_share`` is the share of the model's weights (0 to 1) that trained in at least one of the tasks.
    """
    columns = [*contents["tasks"], *contents["general"]]
    rows = [["", *(column["name"] for column in columns)], ["", *(column["measure"] for column in columns)]]
    rows += [[_name_of(row), *(_in_words(row, column) for column in columns)] for row in contents["rows"]]
    summary = contents["summary"]
    for title, scores in (
        ("best - last", summary["forgetting"]),
        ("before - base", summary["forward_transfer"]),
        ("last - base", summary["general_changes"]),
    ):
        if any(score is not None for score in scores.values()):
            rows.append([title, *(_number(scores[each["name"]]) if each["name"] in scores else "" for each in columns)])
    lines = [*table_lines(rows), *(f"  {line}" for line in (*_summary_lines(summary), *_counts(contents)))]
    if trained_share is not None:
        lines.append(f"  trained in at least one of the tasks: {trained_share:.1%} of the weights")
    return "\n".join(lines)


def _name_of(row: Mapping[str, Any]) -> str:
    return "base" if row["after"] is None else f"after {row['after']}"


def _in_words(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    cell = row["cells"].get(column["name"])
    if cell is None:
        return NOT_EVALUATED
    if cell["value"] is None:
        return NO_NUMBER
    return f"{cell['value']:.1f}" if is_of_hundred(column["measure"]) else f"{cell['value']:.4g}"


def _counts(contents: Contents) -> list[str]:
    """Lines about answers without an end of their own and the like, which a score may reflect more than the task."""
    lines = []
    for column in (*contents["tasks"], *contents["general"]):
        cells = [row["cells"][column["name"]] for row in contents["rows"] if column["name"] in row["cells"]]
        counts = sum((Counter(cell["counts"]) for cell in cells), Counter[str]())
        if counts.total():
            examples = sum(cell["examples"] for cell in cells)
            lines.append(f"{column['name']}, all rows: {counted(counts, examples)}")
    return lines


def _number(score: float | None) -> str:
    return NOT_EVALUATED if score is None else f"{score:.4g}"


def _summary_lines(summary: Mapping[str, Any]) -> list[str]:
    tasks = summary["tasks"]
    if not tasks:
        return []
    scores = [
        f"OP {_number(summary['op'])}",
        f"BWT {_number(summary['bwt'])} (over T)",
        f"{_number(summary['bwt_over_t_minus_1'])} (over T - 1)",
    ]
    lines = [f"{', '.join(scores)}, T = {tasks}"]
    if summary["general_delta"] is not None:
        lines.append(f"general ability {summary['general_delta']:+.4g}, the mean over scores from 0 to 100")
    for name, kl in summary["kl"].items():
        both = f"KL(base || tuned) {_number(kl['kl_base_tuned'])}, KL(tuned || base) {_number(kl['kl_tuned_base'])}"
        lines.append(f"{name}: {both} nats per token")
    return lines


def draw_matrix(contents: Contents, path: Path) -> None:
    """Writes the matrix as PNG: the darker a cell, the higher its score; the score in a task right after its own
    training has a frame, and cells that were not evaluated are grey.

    Raises OSError when the file cannot be written.
    """
    font = ImageFont.load_default()
    columns, rows = [*contents["tasks"], *contents["general"]], contents["rows"]
    names = [_name_of(row) for row in rows]
    words = [[column["name"], column["measure"], *(_in_words(row, column) for row in rows)] for column in columns]
    lines = _summary_lines(contents["summary"])
    left = round(max(map(font.getlength, names))) + 2 * PADDING
    spans = _spans(left, [round(max(map(font.getlength, column))) for column in words], len(contents["tasks"]))
    top = MARGIN + 2 * CELL_HEIGHT
    bottom = top + CELL_HEIGHT * len(rows)
    right = max([spans[-1][1], *(MARGIN + round(font.getlength(line)) for line in lines)]) + MARGIN
    image = Image.new("RGB", (right, bottom + CELL_HEIGHT * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    for number, name in enumerate([*names, *lines]):
        middle = top + CELL_HEIGHT * number + CELL_HEIGHT // 2
        draw.text((MARGIN, middle), name, fill=INK, font=font, anchor="lm")
    for number, (column, (first, last)) in enumerate(zip(columns, spans, strict=True), start=1):
        for line, word in enumerate(words[number - 1]):
            box = (first, top + CELL_HEIGHT * (line - 2), last, top + CELL_HEIGHT * (line - 1))
            if line < 2:
                _write(draw, box, word, INK, font)
                continue
            background = _colour(rows[line - 2]["cells"].get(column["name"]), column)
            fill(draw, box, background)
            _write(draw, box, word, PAPER if sum(background) < sum(PAPER) / 2 else INK, font)
            if number == line - 2 <= len(contents["tasks"]):
                draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=INK, width=2)
    image.save(path, format="PNG")


def _spans(left: int, widths: Sequence[int], tasks: int) -> list[tuple[int, int]]:
    """Left and right of each column; a gap separates the tasks from the general ones."""
    spans = []
    for number, width in enumerate(widths):
        left += GENERAL_GAP if number == tasks else 0
        spans.append((left, left + width + 2 * PADDING))
        left = spans[-1][1]
    return spans


def _colour(cell: Mapping[str, Any] | None, column: Mapping[str, Any]) -> Colour:
    if cell is None:
        return FROZEN
    if cell["value"] is None or not is_of_hundred(column["measure"]):
        return PAPER
    red, green, blue = (round(low + (high - low) * cell["value"] / 100) for low, high in zip(PAPER, FULL, strict=True))
    return red, green, blue


def _write(draw: ImageDraw.ImageDraw, box: Box, word: str, colour: Colour, font: Any) -> None:
    middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
    draw.text(middle, word, fill=colour, font=font, anchor="mm")
