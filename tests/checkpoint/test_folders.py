"""Which checkpoints a folder holds, and which may go. Run: pytest tests/checkpoint/test_folders.py"""

from pathlib import Path

import pytest

from hft_megatron.checkpoint import finished
from hft_megatron.checkpoint.finished import Reached, discard_checkpoints, discarded, reached
from hft_megatron.checkpoint.folders import DIGESTS_FILE, chain_of, delete_superseded, find_checkpoints, identity_of
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.errors import UserError


def make_checkpoint(folder: Path, iteration: int, *, base: int | None = None, complete: bool = True) -> Path:
    path = folder / f"iter_{iteration:07d}"
    path.mkdir()
    TrainState(iteration=iteration, base_iteration=base, base_digest=None if base is None else "x").write(path)
    if complete:
        (path / DIGESTS_FILE).write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return path


def iterations(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in find_checkpoints(str(folder)).complete]


def test_a_folder_that_is_empty_or_absent_holds_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        found = find_checkpoints(str(folder))
        assert (found.newest, found.missing, found.notes()) == (None, None, [])


def test_an_unfinished_save_is_skipped_and_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    (tmp_path / "iter_0000004.unfinished-1f").mkdir()
    (tmp_path / "iter_0000006").mkdir()
    found = find_checkpoints(str(tmp_path))
    assert found.newest == tmp_path / "iter_0000002"
    said = "\n".join(found.notes())
    assert "iter_0000004.unfinished-1f: it is incomplete" in said
    assert "iter_0000006: it is incomplete" in said


def test_the_newest_checkpoint_is_that_of_the_largest_iteration_whatever_its_digits(tmp_path: Path) -> None:
    for iteration in (9_999_999, 10_000_000, 5):
        make_checkpoint(tmp_path, iteration)
    assert iterations(tmp_path) == [10_000_000, 9_999_999, 5]


def test_a_checkpoint_that_the_tracker_names_and_that_is_gone_is_missing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert find_checkpoints(str(tmp_path)).missing == tmp_path / "iter_0000007"


@pytest.mark.parametrize("text", ["two", "", "-3"])
def test_a_broken_tracker_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match=f"holds '{text}', which is not an iteration"):
        find_checkpoints(str(tmp_path))


def test_a_tracker_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="which is not an iteration"):
        find_checkpoints(str(tmp_path))


def test_what_the_tracker_names_is_missing_and_not_skipped_where_it_is_not_complete(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    path = make_checkpoint(tmp_path, 4, complete=False)
    found = find_checkpoints(str(tmp_path))
    assert found.missing == path
    assert found.notes() == []


@pytest.mark.parametrize("content", [None, "{"])
def test_nothing_is_deleted_where_a_kept_checkpoint_may_need_a_base_that_is_not_known(
    content: str | None, tmp_path: Path
) -> None:
    for iteration in (1, 2, 3, 4):
        make_checkpoint(tmp_path, iteration)
    state = tmp_path / "iter_0000003" / "train_state.json"
    state.unlink() if content is None else state.write_text(content)
    with pytest.raises(UserError, match=r"iter_0000003/train_state.json cannot be read"):
        delete_superseded(str(tmp_path), keep_last=2, retain_interval=None)
    assert iterations(tmp_path) == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("keep_last", "retain", "left"),
    [
        (None, None, [6, 5, 4, 3, 2, 1]),
        (2, None, [6, 5]),
        (9, None, [6, 5, 4, 3, 2, 1]),
        (None, 2, [6, 4, 2]),
        (None, 5, [6, 5]),
        (2, 3, [6, 5, 3]),
    ],
)
def test_superseded_checkpoints_are_deleted(
    keep_last: int | None, retain: int | None, left: list[int], tmp_path: Path
) -> None:
    for iteration in range(1, 7):
        make_checkpoint(tmp_path, iteration)
    gone = delete_superseded(str(tmp_path), keep_last=keep_last, retain_interval=retain)
    assert iterations(tmp_path) == left
    assert sorted(int(path.name[5:]) for path in gone) == sorted({1, 2, 3, 4, 5, 6} - set(left))
    assert not list(tmp_path.glob("*.unfinished*"))


def test_the_base_of_a_kept_checkpoint_is_kept(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    for iteration in (3, 4, 5):
        make_checkpoint(tmp_path, iteration, base=2)
    delete_superseded(str(tmp_path), keep_last=1, retain_interval=None)
    assert iterations(tmp_path) == [5, 2]


def test_what_was_discarded_has_a_record_from_before_the_first_deletion_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (2, 4):
        (make_checkpoint(tmp_path, iteration) / "plan.json").write_text(f"plan {iteration}")
    before = reached(tmp_path)
    assert (discarded(tmp_path), before) == (None, Reached(iteration=4, round=0))
    gone: list[Path] = []

    def fails(path: Path) -> None:
        assert discarded(tmp_path) == before
        gone.append(path)
        raise OSError(5, "a disk that fails")

    with monkeypatch.context() as patch:
        patch.setattr(finished, "delete_checkpoint", fails)
        with pytest.raises(OSError, match="a disk that fails"):
            discard_checkpoints(tmp_path)
    assert gone == [tmp_path / "iter_0000002"]
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000002.unfinished")
    assert reached(tmp_path) == before
    assert [path.name for path in discard_checkpoints(tmp_path)] == ["iter_0000002.unfinished", "iter_0000004"]
    assert discard_checkpoints(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished.json", "plan.json"]
    assert (reached(tmp_path), (tmp_path / "plan.json").read_text()) == (before, "plan 4")
    (tmp_path / "finished.json").write_text("{")
    with pytest.raises(UserError, match=r"finished.json cannot be read"):
        reached(tmp_path)


def test_a_base_in_another_runs_folder_is_found_also_when_both_have_moved_and_is_never_deleted(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    base = make_checkpoint(first, 3)
    for iteration in (1, 2):
        path = make_checkpoint(second, iteration)
        state = TrainState(iteration=iteration, base_iteration=3, base_folder="../first", base_digest=identity_of(base))
        state.write(path)
    delete_superseded(str(second), keep_last=1, retain_interval=None)
    assert (iterations(first), iterations(second)) == ([3], [2])
    moved = tmp_path / "moved"
    moved.mkdir()
    for folder in (first, second):
        folder.rename(moved / folder.name)
    assert [path for path, _ in chain_of(moved / "second" / "iter_0000002")] == [
        moved / "second" / "iter_0000002",
        moved / "first" / "iter_0000003",
    ]
