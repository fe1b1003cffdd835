"""What of earlier tasks is replayed. Run: pytest tests/methods/continual/test_replay.py"""

import json
from pathlib import Path

import pytest

from hft_megatron.errors import UserError
from hft_megatron.methods.continual.replay import write_replays
from hft_megatron.methods.continual.sequence import Part, parts_of
from hft_megatron.methods.continual.tasks import read_continual_tasks
from tests.support.sequences import ROWS, options_of, write_rows, write_sequence


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Part, ...]:
    tasks, save = write_sequence(tmp_path), tmp_path / "run"
    options = options_of(tasks, save, "--replay-ratio", 0.5)
    return parts_of(read_continual_tasks(options.continual, options.as_run), options.as_run, options.continual)


def drawn(folder: Path) -> dict[str, list[str]]:
    """The lines of each file of the draw."""
    return {path.name: path.read_text().splitlines() for path in sorted((folder / "run/replay").iterdir())}


def again(folder: Path, parts: tuple[Part, ...], *, ratio: float, seed: int) -> dict[str, list[str]]:
    """Another draw in the place of the one that is there."""
    for path in (folder / "run/replay").iterdir():
        path.unlink()
    write_replays(parts, ratio=ratio, seed=seed)
    return drawn(folder)


def test_a_share_of_each_earlier_tasks_records_is_drawn_by_seed_and_tasks(
    tmp_path: Path, parts: tuple[Part, ...]
) -> None:
    lines = write_replays(parts, ratio=0.25, seed=1)
    assert lines == [
        f"task_1_numbers replays 4 of {ROWS} records of colours",
        f"task_2_animals replays 4 of {ROWS} records of colours",
        f"task_2_animals replays 4 of {ROWS} records of numbers",
    ]
    found = drawn(tmp_path)
    assert list(found) == [
        "task_1_numbers.colours.jsonl",
        "task_2_animals.colours.jsonl",
        "task_2_animals.numbers.jsonl",
    ]
    for name, rows in found.items():
        source = [json.loads(line) for line in (tmp_path / f"{name.split('.')[1]}.jsonl").read_text().splitlines()]
        places = [source.index(json.loads(row)) for row in rows]
        assert len(places) == 4
        assert places == sorted(set(places)), "each record once, in the order of its file"
    assert found["task_1_numbers.colours.jsonl"] != found["task_2_animals.colours.jsonl"]
    assert again(tmp_path, parts, ratio=0.25, seed=1) == found
    assert again(tmp_path, parts, ratio=0.25, seed=2) != found


@pytest.mark.parametrize(("ratio", "count"), [(1.0, ROWS), (0.4, 6), (0.001, 1)])
def test_the_count_is_the_ratio_rounded_and_at_least_one(
    tmp_path: Path, parts: tuple[Part, ...], ratio: float, count: int
) -> None:
    write_replays(parts, ratio=ratio, seed=1)
    assert {len(rows) for rows in drawn(tmp_path).values()} == {count}


def test_a_draw_of_a_sequence_that_has_begun_is_not_written_over(tmp_path: Path, parts: tuple[Part, ...]) -> None:
    write_replays(parts, ratio=0.25, seed=1)
    before = drawn(tmp_path)
    write_replays(parts, ratio=0.25, seed=1)
    with pytest.raises(UserError, match=r"colours.jsonl holds other records than --replay-ratio and --seed draw now"):
        write_replays(parts, ratio=0.25, seed=2)
    assert drawn(tmp_path) == before


def test_rows_of_a_text_are_no_records_to_draw(tmp_path: Path, parts: tuple[Part, ...]) -> None:
    write_rows(tmp_path / "colours.jsonl", ["a text"])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"colours.jsonl:1: --replay-ratio draws records, and this is none"):
        write_replays(parts, ratio=0.25, seed=1)
