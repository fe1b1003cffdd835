"""Checkpoints of released versions load for ever. Run: pytest tests/checkpoint/test_released.py

``python -m tests.checkpoint.make_released`` made the one of this version. One that was released is never made again.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hft_megatron import __version__
from tests.checkpoint.make_released import EXPECTED_FILE, RELEASED
from tests.support.ranks import RankPools
from tests.support.runs import run_sft_words

VERSIONS = sorted(path.name.removesuffix(".tar.gz") for path in RELEASED.iterdir())


def run_inside(folder: str, words: list[str]) -> dict[str, Any]:
    """``run_sft_words`` in a folder, because the saved options name others relative to it."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return run_sft_words(words)
    finally:
        os.chdir(before)


def test_this_version_leaves_a_checkpoint_to_later_ones() -> None:
    assert __version__ in VERSIONS, "run python -m tests.checkpoint.make_released"


@pytest.mark.engine
@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_of_a_released_version_resumes(version: str, ranks: RankPools, tmp_path: Path) -> None:
    shutil.unpack_archive(RELEASED / f"{version}.tar.gz", tmp_path, filter="data")
    expected = json.loads((tmp_path / EXPECTED_FILE).read_text())
    words = [*expected["words"], "--load", "run", "--save", "run"]
    [answer] = ranks(1).run(run_inside, folder=str(tmp_path), words=words)
    assert sum("recorded no schedule" in line for line in answer["said"]) == 1
    losses = {str(step["iteration"]): step["loss"] for step in answer["steps"]}
    assert list(losses) == ["3", "4"]
    assert losses == pytest.approx(expected["losses"], rel=0, abs=1e-5)
