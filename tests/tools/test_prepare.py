"""A prepared folder is made once, whole, and by one process; the training itself is replaced here."""

import fcntl
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import prepare
import pytest
import settings
from launching import DemoError
from prepare import DemoFolder


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose training was started; the stand-in only makes the model's folder."""
    started: list[Path] = []

    def train(folder: DemoFolder, lock: int) -> None:
        started.append(folder.path)
        folder.model.mkdir(exist_ok=True)

    monkeypatch.setattr(prepare, "_pretrain", train)
    monkeypatch.setattr(prepare, "_recalled_facts", lambda folder: 0.95)
    return started


def test_a_complete_folder_is_returned_as_it_is(tmp_path: Path, trainings: list[Path]) -> None:
    folder = prepare.prepare(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = prepare.prepare(tmp_path)
    assert again == folder
    assert json.loads(again.mark.read_text())["recalled facts"] == 0.95
    assert trainings == [tmp_path]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_an_interrupted_preparation_is_completed_by_the_next_call(
    tmp_path: Path, trainings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as interrupted:
        interrupted.setattr(prepare, "_recalled_facts", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(tmp_path)
    assert not DemoFolder(path=tmp_path).mark.exists()
    tokenizer = DemoFolder(path=tmp_path).tokenizer.read_bytes()
    assert prepare.prepare(tmp_path).mark.exists()
    assert trainings == [tmp_path, tmp_path]
    # The trainer resumes only on the same data and tokenizer.
    assert DemoFolder(path=tmp_path).tokenizer.read_bytes() == tokenizer


def test_a_folder_made_with_other_settings_is_named_and_kept(
    tmp_path: Path, trainings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare(tmp_path)
    monkeypatch.setattr(settings, "PEOPLE", settings.PEOPLE + 1)
    with pytest.raises(DemoError, match=r"other settings \(people\)"):
        prepare.prepare(tmp_path)
    assert json.loads((tmp_path / "complete.json").read_text())["settings"]["people"] == settings.PEOPLE - 1


def test_a_second_process_waits_for_the_first(tmp_path: Path, trainings: list[Path]) -> None:
    holds, release = multiprocessing.Event(), multiprocessing.Event()
    holder = multiprocessing.Process(target=_hold_lock, args=(tmp_path / ".lock", holds.set, release.wait))
    holder.start()
    try:
        assert holds.wait(30)
        waiter = multiprocessing.Process(target=prepare.prepare, args=(tmp_path,))
        waiter.start()
        time.sleep(1.0)
        assert not (tmp_path / "tokenizer.model").exists()
        release.set()
        waiter.join(60)
        assert waiter.exitcode == 0
        assert DemoFolder(path=tmp_path).mark.exists()
    finally:
        release.set()
        holder.join(30)


def _hold_lock(path: Path, held: Callable[[], None], wait: Callable[[], bool]) -> None:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held()
        wait()


def _interrupt(folder: DemoFolder) -> float:
    raise KeyboardInterrupt
