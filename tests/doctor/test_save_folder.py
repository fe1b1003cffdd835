"""Whether checkpoints can be written, and fit. Run: pytest tests/doctor/test_save_folder.py"""

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.doctor.findings import Finding
from hft_megatron.doctor.measurements import checkpoints_at_a_time, compare_space, save_folder_finding

GB = 10**9


def look_at(folder: Path) -> Finding:
    return save_folder_finding(RunConfig(checkpoint=CheckpointConfig(save=str(folder))), 1)


def test_a_folder_that_the_run_will_make_is_ok_and_is_not_made(tmp_path: Path) -> None:
    finding = look_at(tmp_path / "new" / "run")
    assert finding.status == "ok"
    assert f"{tmp_path}/new/run can be made, " in finding.value
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_in_a_folder_that_is_there(tmp_path: Path) -> None:
    assert "can be written" in look_at(tmp_path).value
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = look_at(tmp_path / "file" / "run")
    assert finding.status == "wrong"
    assert f"{tmp_path}/file is not a folder" in str(finding.fix)


def test_a_disk_that_refuses_what_the_rights_allow_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    finding = look_at(tmp_path)
    assert finding.status == "wrong"
    assert "cannot be written: Read-only file system" in str(finding.fix)


@pytest.mark.parametrize(
    ("free", "kept", "status"),
    [(9, 1, "wrong"), (10, 1, "ok"), (29, 3, "warning"), (30, 3, "ok"), (10, None, "ok"), (9, 0, "wrong")],
)
def test_one_checkpoint_must_fit_and_all_that_are_kept_should(free: int, kept: int | None, status: str) -> None:
    finding = compare_space("run", free * GB, 10 * GB, kept)
    assert finding.status == status


def test_the_warning_says_how_many_checkpoints_fit() -> None:
    finding = compare_space("run", 25 * GB, 10 * GB, 4)
    assert finding.value == "25.0 GB free, a checkpoint takes about 10.0 GB, 4 at a time 40.0 GB"
    assert str(finding.fix).startswith("--save run has space for 2 of 4 checkpoints: ")


@pytest.mark.parametrize(
    ("options", "iterations", "count"),
    [
        ({}, 100, 1),
        ({}, 0, 0),
        ({"save_interval": 30}, 100, 4),  # 30, 60, 90 and the last one
        ({"save_interval": 50}, 100, 2),
        ({"save_interval": 10, "keep_last": 2}, 100, 3),  # the third is complete before the first is deleted
        ({"save_interval": 10, "save_retain_interval": 50}, 100, 4),
        ({"save_interval": 50, "keep_last": 9}, 100, 2),
    ],
)
def test_the_checkpoints_of_a_run_are_counted_as_they_are_kept(
    options: dict[str, Any], iterations: int, count: int
) -> None:
    assert checkpoints_at_a_time(CheckpointConfig(save="run", **options), iterations) == count
