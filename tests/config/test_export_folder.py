"""What stays of exports during training. Run: pytest tests/config/test_export_folder.py"""

import json
import shutil
from pathlib import Path

import pytest

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.export_folder import ExportFolder
from hft_megatron.config.exports import BEST_METRICS, check_filled_export_folder, higher_is_better
from hft_megatron.config.run import RunConfig
from hft_megatron.conversion.kept_files import FinalExport, IterationExport
from hft_megatron.errors import UserError
from hft_megatron.tracking import tracker


def exported(folder: ExportFolder, iteration: int, **measured: float) -> list[str]:
    """Makes an export of one file; the lines that were said."""
    export = IterationExport(folder=folder, iteration=iteration, measured=measured)
    unfinished = export.open()
    (unfinished / "config.json").write_text(str(iteration))
    return export.publish(unfinished)


def iterations(folder: ExportFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.path.glob("iter_*"))


def best(folder: ExportFolder) -> tuple[object, object, object]:
    noted = json.loads((folder.path / "exports.json").read_text())
    return noted["best_global_step"], noted["best_metric"], noted["best_model_checkpoint"]


@pytest.mark.parametrize(("higher", "values"), [(False, [3.0, 1.0, 2.0, 1.0, 5.0]), (True, [0.1, 0.9, 0.2, 0.9, 0.3])])
def test_the_newest_and_the_first_best_stay(higher: bool, values: list[float], tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path / "out", keep=2, metric="m", higher=higher)
    folder.begin("run", 0)
    for number, value in enumerate(values):
        exported(folder, 10 * number + 10, m=value)
    assert iterations(folder) == [20, 40, 50]
    assert best(folder) == (20, values[1], "iter_0000020")
    assert {path.name for path in folder.path.iterdir()} == {
        *(f"iter_00000{iteration}" for iteration in (20, 40, 50)),
        "exports.json",
    }


def test_exports_that_a_run_went_back_before_are_not_another_runs_to_take(tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path)
    folder.begin("run", 0)
    config = RunConfig(checkpoint=CheckpointConfig(save_hf=str(tmp_path), save_hf_interval=2))
    check_filled_export_folder(config)  # nothing is there but the notes
    exported(folder, 2)
    folder.begin("run", 0)
    noted = folder.noted()
    assert noted is not None
    assert noted.exports == {}
    with pytest.raises(UserError, match="holds exports of a run other than the one in --save None"):
        check_filled_export_folder(config)


def test_a_better_one_takes_the_place_of_the_best_and_both_are_said(tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path, keep=1, metric="m")
    folder.begin("run", 0)
    assert exported(folder, 1, m=2.0) == ["  it is the best so far: m 2"]
    assert exported(folder, 2, m=float("nan")) == []
    assert exported(folder, 3, m=0.5) == [
        "  it is the best so far: m 0.5",
        f"  deleted {tmp_path}/iter_0000001",
        f"  deleted {tmp_path}/iter_0000002",
    ]
    assert iterations(folder) == [3]


def test_without_a_number_to_keep_all_stay_and_another_metric_can_be_asked_for_later(tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path)
    folder.begin("run", 0)
    for iteration, loss, accuracy in ((1, 0.1, 0.2), (2, 0.3, 0.9)):
        exported(folder, iteration, loss=loss, accuracy=accuracy)
    assert best(folder) == (None, None, None)
    ExportFolder(tmp_path, metric="accuracy", higher=True).begin("run", 2)
    assert best(folder) == (2, 0.9, "iter_0000002")
    assert iterations(folder) == [1, 2]


def test_a_run_that_goes_back_keeps_later_exports_until_it_comes_to_them_again(tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path, keep=1, metric="m")
    folder.begin("run", 0)
    for iteration in (2, 4, 6):
        exported(folder, iteration, m=1.0 / iteration)
    (tmp_path / ".iter_0000008.unfinished").mkdir()
    (tmp_path / ".iter_0000004.old.unfinished").mkdir()
    assert folder.begin("run", 4) == [f"{tmp_path}/iter_0000006 will be overwritten at its iteration"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exports.json", "iter_0000006"]
    assert best(folder) == (None, None, None)
    exported(folder, 5, m=0.5)
    assert iterations(folder) == [5, 6], "what is later is none of the newest"
    exported(folder, 6, m=0.7)
    assert iterations(folder) == [5, 6]
    assert best(folder)[0] == 5


def test_an_old_export_that_cannot_be_deleted_ends_neither_the_run_nor_its_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that somebody has open stays, and its folder with it."""
    folder, delete = ExportFolder(tmp_path, keep=1), shutil.rmtree

    def delete_unless_open(path: Path, ignore_errors: bool = False) -> None:
        if ".old" not in str(path):
            delete(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", delete_unless_open)
    for _ in range(2):
        folder.begin("run", 0)
        exported(folder, 1)
        [line] = exported(folder, 2)
        assert line.startswith("> older exports could not be deleted: [Errno 39] Directory not empty: ")
        assert iterations(folder) == [2]
    noted = folder.noted()
    assert noted is not None
    assert list(noted.exports) == ["iter_0000002"]
    assert folder.strangers() == []
    monkeypatch.undo()
    folder.begin("run", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exports.json", "iter_0000002"]


def test_a_final_export_that_was_being_moved_is_taken_away_and_what_a_user_put_there_is_not(tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path)
    folder.begin("run", 0)
    exported(folder, 2)
    final = FinalExport(folder=folder, iteration=2)
    unfinished = final.open()
    for name in ("a.safetensors", "config.json", "z.txt"):
        (unfinished / name).write_text(name)
    (unfinished / "templates").mkdir()
    (tmp_path / "z.txt").mkdir()  # the move stops here
    (tmp_path / "z.txt" / "x").write_text("")
    with pytest.raises(OSError, match=r"z\.txt"):
        final.publish(unfinished)
    (tmp_path / "mine").write_text("")
    assert (tmp_path / "templates").exists()
    assert not folder.has_final()
    assert folder.strangers() == ["mine"]
    folder.begin("run", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exports.json", "iter_0000002", "mine"]
    unfinished = final.open()
    (unfinished / "config.json").write_text("")
    final.publish(unfinished)
    folder.begin("run", 2)
    assert folder.has_final()
    assert not unfinished.exists()


def test_notes_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "exports.json").write_text("{")
    with pytest.raises(UserError, match=r"exports.json cannot be read .*; choose a new folder."):
        ExportFolder(tmp_path).noted()


def test_the_metrics_to_choose_by_are_those_of_the_log() -> None:
    names = {value for value in vars(tracker).values() if isinstance(value, str)}
    assert {name for metrics in BEST_METRICS.values() for name in metrics} <= names
    assert [higher_is_better(name) for name in (tracker.LOSS, tracker.PREFERENCE_LOSS)] == [False, False]
    assert [higher_is_better(name) for name in (tracker.REWARD_ACCURACY, tracker.REWARD_MARGIN)] == [True, True]
