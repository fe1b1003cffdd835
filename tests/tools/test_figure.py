"""The README's picture shows what the code selects."""

import runpy

from tests.support.ranks import REPOSITORY

FOLDER = REPOSITORY / "tools" / "figure"


def test_the_committed_picture_is_the_one_the_script_draws() -> None:
    script = runpy.run_path(str(FOLDER / "draw_layer.py"))
    assert (FOLDER / "hft_layers.svg").read_text() == script["draw"](script["drawn_plan"]())
