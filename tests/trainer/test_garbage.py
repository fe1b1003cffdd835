"""When Python's garbage and torch's freed memory are given back. Run: pytest tests/trainer/test_garbage.py"""

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.support.ranks import RankPools
from tests.support.runs import Recorder, make_inputs, run_recorded, words_for, write_data


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("garbage"))
    write_data(folder / "valid.jsonl", 5)
    return folder


class Watch(Recorder):
    """Notes after how many steps garbage is collected, and of what generation: by hand, or by Python itself."""

    def __init__(self) -> None:
        super().__init__(kill_at=None, kill_rank=0)
        self.by_hand: list[tuple[int, int]] = []
        self.by_itself: list[tuple[int, int]] = []
        self.enabled: list[bool] = []

    def collects(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and self.run is not None:
            noted = self.by_itself if gc.isenabled() else self.by_hand
            noted.append((len(self.steps), info["generation"]))

    def after_step(self, run: Any, result: Any) -> None:
        super().after_step(run, result)
        self.enabled.append(gc.isenabled())
        # Enough to set off a collection, where anything but a hand does.
        self.kept = [[] for _ in range(gc.get_threshold()[0] + 1)]


def run_watched(words: list[str]) -> dict[str, Any]:
    watch = Watch()
    gc.callbacks.append(watch.collects)
    try:
        run_recorded("sft", words, watch)
    finally:
        gc.callbacks.remove(watch.collects)
    names = ("by_hand", "by_itself", "enabled")
    return {name: getattr(watch, name) for name in names} | {"after": gc.isenabled()}


@pytest.mark.parametrize(
    ("words", "collected"),
    [
        ("--manual-gc", [[3, 2], [3, 0], [5, 2], [5, 0]]),
        ("--manual-gc --manual-gc-interval 2", [[2, 2], [3, 2], [3, 0], [4, 2], [5, 2], [5, 0]]),
        ("--manual-gc --no-manual-gc-eval --manual-gc-interval 4", [[4, 2]]),
    ],
)
def test_garbage_is_collected_by_hand_alone(
    words: str, collected: list[list[int]], ranks: RankPools, inputs: Path
) -> None:
    validation = ["--valid-data-path", inputs / "valid.jsonl", "--eval-interval", 3]
    every = words_for(inputs, "--train-iters", 5, *validation, *words.split())
    [found] = ranks(1).run(run_watched, words=every)
    # A round's first hook notes the run after the collection before training.
    assert found["by_hand"] == collected
    assert found["enabled"] == [False] * 5
    assert found["after"]


def test_without_the_option_python_collects_when_it_likes(ranks: RankPools, inputs: Path) -> None:
    [found] = ranks(1).run(run_watched, words=words_for(inputs, "--manual-gc-interval", 2))
    assert found["enabled"] == [True] * 6
    assert found["by_hand"] == []
    assert len(found["by_itself"]) >= 6


def run_counting(words: list[str]) -> int:
    with patch.object(torch.cuda, "empty_cache") as emptied:
        run_recorded("sft", words, Recorder(kill_at=None, kill_rank=0))
    return emptied.call_count


@pytest.mark.parametrize("level", [0, 1, 2])
def test_unused_memory_is_given_back_as_often_as_the_level_says(level: int, ranks: RankPools, inputs: Path) -> None:
    words = words_for(inputs, "--train-iters", 3, "--empty-unused-memory-level", level)
    assert ranks(1).run(run_counting, words=words) == [3 * level]
