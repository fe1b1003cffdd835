"""A score matrix as a table and as a picture. Run: pytest tests/evaluation/test_matrix_report.py"""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hft_megatron.evaluation.matrix import Cell, Column, ScoreMatrix
from hft_megatron.report.continual import draw_matrix, matrix_text
from hft_megatron.report.plan_picture import FROZEN, INK, PAPER, ROUND_COLOURS


@pytest.fixture
def contents() -> dict[str, Any]:
    """Two tasks that are done, one to come, and a text beside them."""
    names = {"first": "exact_match", "Straße 态度": "sari", "third": "exact_match", "text": "bits_per_byte"}
    columns = [Column(name=name, digest=name, measure=measure) for name, measure in names.items()]
    matrix = ScoreMatrix(columns[:3], columns[3:])
    scores: dict[tuple[int, str], float | None] = {
        (0, "first"): 0, (0, "text"): 1.5,
        (1, "first"): 100, (1, "text"): None,
        (2, "first"): 50.06, (2, "Straße 态度"): 75, (2, "text"): 12.3456,
    }  # fmt: skip
    for (after, name), value in scores.items():
        counts = {"without_end": after, "without_answer": 0} if name == "first" else {}
        matrix.put(after, name, Cell(value=value, examples=10, counts=counts))
    return matrix.contents()


def test_the_table_has_every_cell_and_says_what_is_not_there(contents: dict[str, Any]) -> None:
    assert matrix_text(contents, trained_share=0.75).splitlines() == [
        "                         first  Straße 态度        third           text",
        "                   exact_match       sari  exact_match  bits_per_byte",
        "  base                     0.0          -            -            1.5",
        "  after first            100.0          -            -      no number",
        "  after Straße 态度         50.1       75.0            -          12.35",
        "  best - last            49.94          0",
        "  last - base                                                   10.85",
        "  OP 62.53, BWT -24.97 (over T), -49.94 (over T - 1), T = 2",
        "  first, all rows: without end 3, of 30 examples",
        "  trained in at least one of the tasks: 75.0% of the weights",
    ]


def test_general_ability_is_in_the_table_where_it_was_measured() -> None:
    columns = [Column(name=name, digest=name, measure="accuracy") for name in ("task", "maths")]
    matrix = ScoreMatrix(columns[:1], columns[1:])
    for after, name, value in ((0, "maths", 40.0), (1, "task", 90.0), (1, "maths", 37.5)):
        matrix.put(after, name, Cell(value=value, examples=10))
    assert matrix_text(matrix.contents()).splitlines()[-2:] == [
        "  OP 90, BWT 0 (over T), - (over T - 1), T = 1",
        "  general ability -2.5, the mean over scores from 0 to 100",
    ]


def test_a_matrix_without_cells_is_a_table_of_names(contents: dict[str, Any]) -> None:
    empty = ScoreMatrix([Column(name="first", digest="", measure="sari")]).contents()
    assert matrix_text(empty).splitlines() == ["        first", "         sari", "  base      -"]


def test_the_picture_has_a_shade_for_every_score(contents: dict[str, Any], tmp_path: Path) -> None:
    draw_matrix(contents, tmp_path / "matrix.png")
    image = Image.open(tmp_path / "matrix.png").convert("RGB")
    shades = {colour: count for count, colour in image.getcolors(1 << 16) or []}
    full = ROUND_COLOURS[0]
    half = tuple(round(255 + (high - 255) * 50.06 / 100) for high in full)
    three_quarters = tuple(round(255 + (high - 255) * 0.75) for high in full)
    for colour in (full, half, three_quarters, PAPER, FROZEN, INK):
        assert shades.get(colour, 0) > 300, colour
    # Six cells were not evaluated: of 24 rows of pixels each, and as wide as two words and more.
    assert shades[FROZEN] > 4 * shades[full] > 4 * 24 * 40


def test_the_pictures_of_equal_matrices_are_equal_and_of_others_are_not(
    contents: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("one", "same"):
        draw_matrix(contents, tmp_path / name)
    contents["rows"][2]["cells"]["first"]["value"] = 49.0
    draw_matrix(contents, tmp_path / "other")
    one, same, other = ((tmp_path / name).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    with pytest.raises(OSError, match="nowhere"):
        draw_matrix(contents, tmp_path / "nowhere" / "matrix.png")
