"""``hft-megatron plan --png``: the grid of layers and units as a picture, a colour per round."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hft_megatron.config.adapters import adapted_unit
from hft_megatron.report.plan import PlanReport
from hft_megatron.report.plan_text import OUTER_ROWS, UNIT_LETTERS

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

ROUND_COLOURS: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
)
"""Colours that colour-blind people can distinguish (Okabe and Ito's palette); later rounds repeat them."""
FROZEN: Colour = (228, 228, 228)
INK: Colour = (40, 40, 40)
PAPER: Colour = (255, 255, 255)

STRIP_WIDTH = 12
"""Pixels of one round in a cell."""
LEAST_CELL_WIDTH = 36
ROW_HEIGHT = 16
GAP = 2
CATEGORY_GAP = 14
LEFT, TOP, MARGIN = 90, 62, 12
STAGE_LEFT = 60
"""Left edge of a layer's pipeline stage, right of the layer's number."""
TITLES = ("attention", "feed-forward", "norm")


def draw_picture(report: PlanReport, path: Path) -> None:
    """Write the picture as PNG. A cell has one strip per round, coloured where the unit trains, else grey.

    Raises OSError when the file cannot be written.
    """
    boxes, rounds = unit_boxes(report), len(report.plans)
    right, bottom = (max(box[side] for box in boxes.values()) for side in (2, 3))
    image = Image.new("RGB", (right + MARGIN, bottom + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    _draw_words(draw, report, boxes)
    for unit, box in boxes.items():
        for index, plan in enumerate(report.plans):
            colour = ROUND_COLOURS[index % len(ROUND_COLOURS)] if plan.trains(unit) else FROZEN
            fill(draw, strip(box, index, rounds), colour)
    image.save(path, format="PNG")


def unit_boxes(report: PlanReport) -> dict[str, Box]:
    """The cell of every unit in pixels: columns by category, a row per layer, and other units across all columns."""
    width, columns = max(LEAST_CELL_WIDTH, STRIP_WIDTH * len(report.plans)), {}
    left = LEFT
    for category in UNIT_LETTERS:
        for _, module in category:
            columns[module] = (left, left + width)
            left += width + GAP
        left += CATEGORY_GAP
    whole_row = (LEFT, left - CATEGORY_GAP - GAP)
    boxes, row = {}, -1
    for unit in report.plans[0].units:
        # An adapter is drawn over its matrix.
        module = (adapted_unit(unit.name) or unit.name).removeprefix(f"model.layers.{unit.layer}.")
        span = whole_row if unit.layer is None else columns[module]
        row = row + 1 if unit.layer is None else unit.layer + 1
        top = TOP + row * (ROW_HEIGHT + GAP)
        boxes[unit.name] = (span[0], top, span[1], top + ROW_HEIGHT)
    return boxes


def strip(box: Box, index: int, rounds: int) -> Box:
    """The part of a cell that shows one of the rounds."""
    left, top, right, bottom = box
    edges = [left + (right - left) * position // rounds for position in (index, index + 1)]
    return edges[0], top, edges[1], bottom


def fill(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    """Colour a box of pixels."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)  # Pillow's corners are inclusive


def _draw_words(draw: ImageDraw.ImageDraw, report: PlanReport, boxes: dict[str, Box]) -> None:
    """Rounds with their colours, headings of the columns, names of the rows."""
    font = ImageFont.load_default()

    def write(left: int, top: int, text: str) -> None:
        draw.text((left, top), text, fill=INK, font=font)

    legend = LEFT
    for index, plan in enumerate(report.plans):
        fill(draw, (legend, 8, legend + 12, 20), ROUND_COLOURS[index % len(ROUND_COLOURS)])
        write(legend + 16, 8, f"round {plan.round}")
        legend += 80
    for title, category in zip(TITLES, UNIT_LETTERS, strict=True):
        lefts = [boxes[f"model.layers.0.{module}"][0] for _, module in category]
        write(lefts[0], 28, title)
        for left, (letter, _) in zip(lefts, category, strict=True):
            write(left, 45, letter)
    names = {name: label for label, name in OUTER_ROWS}
    stages = report.stage_of_layers() if report.parallel.pipeline_model_parallel_size > 1 else {}
    for unit in report.plans[0].units:
        if unit.layer is None or unit.category == "norm":
            label = names[unit.name] if unit.layer is None else f"layer {unit.layer}"
            write(MARGIN, boxes[unit.name][1] + 2, label)
            if unit.layer in stages:
                write(STAGE_LEFT, boxes[unit.name][1] + 2, f"PP {stages[unit.layer]}")
