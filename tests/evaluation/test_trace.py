"""TRACE's tasks as the package has them. Run: pytest tests/evaluation/test_trace.py"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hft_megatron.errors import UserError
from hft_megatron.evaluation.task_files import read_tasks
from hft_megatron.evaluation.tasks import Task
from hft_megatron.evaluation.trace import TRACE, find_trace

SHIPPED = Path(__file__).parents[2] / "examples/tasks/trace.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """TRACE's folder with a row for every file, and its replay data."""
    for name in (*TRACE, "Lima"):
        (tmp_path / "trace" / name).mkdir(parents=True)
        for split in ("train", "eval", "test"):
            row = {"prompt": f"{name} {split}:", "answer": "A"}
            (tmp_path / "trace" / name / f"{split}.json").write_text(json.dumps([row]))
    return tmp_path / "trace"


def settings_of(task: Task) -> Task:
    """Without where it stands."""
    return replace(task, place="", folder=Path(), files=tuple(Path(file).name for file in task.files))


def test_the_tasks_are_those_of_the_shipped_file_and_stand_in_its_order(folder: Path) -> None:
    found = find_trace("--data", folder)
    (folder.parent / "trace.yaml").write_text(SHIPPED.read_text())
    shipped = read_tasks(folder.parent / "trace.yaml")
    assert [settings_of(task) for task in found] == [settings_of(task) for task in shipped]
    assert [task.digest for task in found] == [task.digest for task in shipped]
    assert [task.paths() for task in found] == [(folder / name / "test.json",) for name in TRACE]
    assert [facts.epochs for facts in TRACE.values()] == [5, 3, 7, 5, 3, 5, 5, 7]


def test_a_part_of_the_tasks_keeps_their_order(folder: Path) -> None:
    for name in TRACE:
        if name not in ("20Minuten", "Py150", "C-STANCE"):
            (folder / name).rename(folder / f"not {name}")
    assert [task.name for task in find_trace("--data", folder)] == ["C-STANCE", "Py150", "20Minuten"]


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_a_missing_split_is_named(split: str, folder: Path) -> None:
    (folder / "FOMC" / f"{split}.json").unlink()
    with pytest.raises(UserError, match=rf"--data .*trace: the task FOMC has no {split}.json; add it, or move"):
        find_trace("--data", folder)


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none of TRACE's tasks; it must have folders such as C-STANCE and FOMC"):
        find_trace("--data", tmp_path)
    (tmp_path / "sequence.yaml").touch()
    with pytest.raises(UserError, match=r"; give .*/sequence.yaml, if that is the list of tasks"):
        find_trace("--data", tmp_path)
