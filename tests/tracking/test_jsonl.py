import json
import math
from pathlib import Path

import pytest

from hft_megatron.errors import UserError
from hft_megatron.tracking.tracker import Metrics
from hft_megatron.tracking.trackers import JsonlTracker


def write(path: Path, *, kept_until: float, records: list[tuple[int, Metrics]]) -> None:
    tracker = JsonlTracker(path, kept_until=kept_until)
    for step, metrics in records:
        tracker.log(step, metrics)
    tracker.close()


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_floats_read_back_bit_for_bit_and_each_record_is_one_line(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    write(tmp_path / "run" / "m.jsonl", kept_until=0, records=[(1, {"lm loss": loss, "plan digest": "ab"})])
    assert read(tmp_path / "run" / "m.jsonl") == [{"iteration": 1, "lm loss": loss, "plan digest": "ab"}]


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl", kept_until=0)
    tracker.log(1, {"lm loss": 1.0})
    assert len(read(tmp_path / "m.jsonl")) == 1
    tracker.close()


def test_resume_drops_the_lines_of_iterations_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, kept_until=0, records=[(step, {"lm loss": float(step)}) for step in range(1, 6)])
    write(path, kept_until=3, records=[(4, {"lm loss": 40.0})])
    assert [(line["iteration"], line["lm loss"]) for line in read(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_resume_keeps_the_validation_of_the_resumed_iteration(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, kept_until=0, records=[(2, {"lm loss": 1.0}), (2, {"lm loss validation": 2.0})])
    write(path, kept_until=2, records=[])
    assert [list(line) for line in read(path)] == [["iteration", "lm loss"], ["iteration", "lm loss validation"]]


def test_what_is_no_run_leaves_the_lines_of_one_and_its_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    running = JsonlTracker(path, kept_until=-1)
    running.log(0, {"lm loss validation": 2.0})
    write(path, kept_until=math.inf, records=[(0, {"lm loss validation": 2.0})])
    running.log(1, {"lm loss": 1.0})
    running.close()
    assert [line["iteration"] for line in read(path)] == [0, 0, 1]
    write(path, kept_until=-1, records=[])
    assert read(path) == []


def test_a_fresh_run_starts_an_empty_record(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, kept_until=0, records=[(1, {"lm loss": 1.0})])
    write(path, kept_until=0, records=[(1, {"lm loss": 2.0})])
    assert [line["lm loss"] for line in read(path)] == [2.0]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"iteration": 1, "lm loss": 1.0}\n{"iteration": 2, "lm lo')
    write(path, kept_until=2, records=[(3, {"lm loss": 3.0})])
    assert [line["iteration"] for line in read(path)] == [1, 3]


@pytest.mark.parametrize("line", ["not json", '{"loss": 1}', "[1]", '{"iteration": "2"}'])
def test_a_file_that_is_not_ours_is_refused_by_line_and_left_as_it_is(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    text = f'{{"iteration": 1}}\n{line}\n'
    path.write_text(text)
    with pytest.raises(UserError, match=r"m\.jsonl:2 "):
        JsonlTracker(path, kept_until=5)
    assert path.read_text() == text
