"""Exit codes, the status file, help, and who speaks. Run: pytest tests/cli/test_entry.py"""

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hft_megatron import errors
from hft_megatron.cli import boundary, entry, main
from hft_megatron.config.run_folder import write_atomically
from hft_megatron.parallel import launch
from tests.cli.conftest import LAUNCH_VARIABLES, SHAPE, Training
from tests.support import forked


@pytest.fixture
def options(model_folder: Path, tmp_path: Path) -> list[str]:
    """A good command whose save folder exists."""
    (tmp_path / "run").mkdir()
    data = ["--load-hf", str(model_folder), "--train-data-path", "data.jsonl"]
    return ["sft", *data, "--save", str(tmp_path / "run")]


def status(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "run" / "status.json").read_text())


def raising(error: BaseException) -> Any:
    def outcome() -> None:
        raise error

    return outcome


def test_a_process_that_nobody_launched_becomes_a_run_of_one_rank(options: list[str], training: Training) -> None:
    assert main(options) == errors.EXIT_OK
    [(name, config, shape)] = training.calls
    assert name == "run"
    assert shape == SHAPE
    assert config.data.train_data_path == ("data.jsonl",)
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert int(os.environ["MASTER_PORT"]) > 0


def test_a_launched_process_keeps_its_environment(
    options: list[str], training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = dict(zip(LAUNCH_VARIABLES, ("3", "4", "1", "2", "10.0.0.1", "29500"), strict=True))
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert main(options) == errors.EXIT_OK
    assert {name: os.environ[name] for name in LAUNCH_VARIABLES} == launched


def test_half_of_a_launch_environment_is_a_mistake(
    options: list[str],
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options) == errors.EXIT_USAGE
    assert "RANK is missing from the environment" in capsys.readouterr().err
    assert training.calls == []


def test_check_says_ok_and_trains_nothing(
    options: list[str],
    training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([*options, "--check", "--tensor-model-parallel-size", "2"]) == errors.EXIT_OK
    assert [name for name, *_ in training.calls] == ["check"]
    assert capsys.readouterr().out.splitlines() == [
        f"OK: a LLaMA of {SHAPE.parameter_count():,} parameters on TP 2 x PP 1 x DP 2, global batch size 2"
    ]
    assert not (tmp_path / "run" / "status.json").exists()
    monkeypatch.setenv("RANK", "1")
    assert main([*options, "--check", "--tensor-model-parallel-size", "2"]) == errors.EXIT_OK
    assert capsys.readouterr().out == ""


def test_a_mistake_in_the_data_is_found_by_check(
    options: list[str], training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.outcome = raising(errors.UserError("data.jsonl:3: the line is not JSON."))
    assert main([*options, "--check"]) == errors.EXIT_USAGE
    assert capsys.readouterr().err == "hft-megatron: error: data.jsonl:3: the line is not JSON.\n"


@pytest.mark.parametrize(
    ("error", "code", "state", "message"),
    [
        (None, errors.EXIT_OK, "finished", ""),
        (errors.UserError("Wrong."), errors.EXIT_USAGE, "usage", "error: Wrong."),
        (errors.Stopped("Saved."), errors.EXIT_STOPPED, "stopped", "Saved."),
        (RuntimeError("broken"), errors.EXIT_FAILURE, "failed", "RuntimeError: broken"),
        (KeyboardInterrupt(), errors.EXIT_INTERRUPTED, "failed", "interrupted from the keyboard"),
    ],
)
def test_every_outcome_has_its_exit_code_and_status(
    error: BaseException | None,
    code: int,
    state: str,
    message: str,
    options: list[str],
    training: Training,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if error is not None:
        training.outcome = raising(error)
    assert main(options) == code
    assert status(tmp_path) == {"exit_code": code, "state": state, "message": message}
    assert ("Traceback" in capsys.readouterr().err) == (code == errors.EXIT_FAILURE)


def test_sigterm_ends_a_process_of_its_own_with_a_sentence_and_leaves_a_rank_as_it_was(
    options: list[str],
    training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    training.outcome = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert main(options) == errors.EXIT_STOPPED
    sentence = "stopped by SIGTERM before the end; run the same command again"
    assert capsys.readouterr().err == f"hft-megatron: {sentence}\n"
    assert status(tmp_path) == {"exit_code": errors.EXIT_STOPPED, "state": "stopped", "message": sentence}
    for name, value in zip(LAUNCH_VARIABLES, ("0", "2", "0", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    seen = []
    training.outcome = lambda: seen.append(signal.getsignal(signal.SIGTERM))
    assert main(options) == errors.EXIT_OK
    assert seen == [signal.getsignal(signal.SIGTERM)] == [before]


@pytest.mark.parametrize("error", [errors.PeersLost("Rank 1 is gone."), RuntimeError("connection closed")])
@pytest.mark.parametrize(
    ("before", "meanwhile", "kept"),
    [
        (None, "usage", True),
        ("usage", "usage", True),
        ("usage", None, False),
        ("usage", "removed", False),
        (None, "finished", False),
    ],
)
def test_what_follows_from_another_ranks_mistake_leaves_that_in_the_status(
    error: Exception,
    before: str | None,
    meanwhile: str | None,
    kept: bool,
    options: list[str],
    training: Training,
    tmp_path: Path,
) -> None:
    file = tmp_path / "run" / "status.json"

    def write(state: str | None) -> None:
        if state == "removed":
            file.unlink()
        elif state is not None:
            write_atomically(file, json.dumps({"exit_code": 2, "state": state, "message": "Rank 1 lacks a file."}))

    def outcome() -> None:
        write(meanwhile)
        raise error

    write(before)
    training.outcome = outcome
    assert main(options) == errors.EXIT_FAILURE
    assert status(tmp_path)["state"] == ("usage" if kept else "failed")


def test_a_mistake_creates_no_save_folder(
    options: list[str], training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").rmdir()
    assert main([*options, "--hft-ratio", "2"]) == errors.EXIT_USAGE
    assert not (tmp_path / "run").exists()


def test_the_status_of_a_mistake_is_written_where_the_folder_exists(
    options: list[str], training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--hft-ratio", "2"]) == errors.EXIT_USAGE
    assert status(tmp_path)["exit_code"] == errors.EXIT_USAGE


def test_another_rank_speaks_only_when_rank_0_has_nothing_to_say(
    options: list[str],
    training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in zip(LAUNCH_VARIABLES, ("1", "2", "1", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        assert capsys.readouterr().err == ""
        waits.append(seconds)

    monkeypatch.setattr(boundary.time, "sleep", sleep)
    before = signal.getsignal(signal.SIGTERM)
    training.outcome = raising(errors.UserError("This node has no such file."))
    try:
        assert main(options) == errors.EXIT_USAGE
    finally:
        signal.signal(signal.SIGTERM, before)
    assert waits == [boundary.OTHER_RANKS_WAIT_S]
    err = capsys.readouterr().err
    assert err.startswith("hft-megatron: rank 1 on ")
    assert err.endswith(": error: This node has no such file.\n")
    # The script on another host says it again.
    assert f"hft-megatron: {status(tmp_path)['message']}\n" == err


def test_two_ranks_with_the_same_mistake_say_it_once(model_folder: Path, tmp_path: Path) -> None:
    words = ["-m", "hft_megatron", "sft", "--load-hf", str(model_folder), "--hft-ratio", "2"]
    ended = forked.run([*forked.torchrun(2), *words], tmp_path)
    assert ended.returncode == 1  # torchrun's own, for any failure
    assert ended.stderr.count("--hft-ratio 2.0: must be a number between 0 and 1") == 1


def test_a_stopped_run_ends_well_for_a_torchrun_that_would_start_it_again(tmp_path: Path) -> None:
    started = {errors.EXIT_CODES_VARIABLE: str(tmp_path), "LOCAL_RANK": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}
    restarted = {**started, "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert launch.leave_exit_code(errors.EXIT_STOPPED, {}) == errors.EXIT_STOPPED
    assert launch.leave_exit_code(errors.EXIT_STOPPED, started) == errors.EXIT_STOPPED
    assert launch.leave_exit_code(errors.EXIT_USAGE, restarted) == errors.EXIT_USAGE
    assert launch.leave_exit_code(errors.EXIT_STOPPED, restarted) == errors.EXIT_OK
    assert (tmp_path / "1").read_text() == str(errors.EXIT_STOPPED)
    lost = {**restarted, errors.EXIT_CODES_VARIABLE: str(tmp_path / "gone")}
    assert launch.leave_exit_code(errors.EXIT_STOPPED, lost) == errors.EXIT_STOPPED, "else it would seem finished"


def test_help_lists_commands_and_options_within_two_seconds_of_work_and_without_torch() -> None:
    code = (
        "import sys, time; from hft_megatron.cli import main; code = main(sys.argv[1:]); "
        "assert time.process_time() < 2.0, time.process_time(); "
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    for words, shown in ((["--help"], "sft "), ([], "sft "), (["sft", "--help"], "(at least 1; default: 1)")):
        command = [sys.executable, "-c", code, *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == errors.EXIT_OK, ended.stderr
        assert shown in ended.stdout
        assert "Traceback" not in ended.stderr


def test_the_version_is_a_line_per_thing_and_imports_none_of_them() -> None:
    code = "import sys; from hft_megatron.cli import main; main(['--version']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[0] for line in said]
    assert names == ["hft-megatron", "torch", "megatron-core", "transformer-engine", "Apex", "False"]
    assert re.fullmatch(r"torch \d\S+, for (CPU|CUDA \d+\.\d+)", said[1])
    assert said[2] == f"megatron-core {metadata.version('megatron-core')}"


def test_an_apex_without_its_kernels_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_installed", lambda name: "0.9")
    for found, kernels in ((None, "without"), (object(), "with")):
        monkeypatch.setattr(entry, "find_spec", lambda name, found=found: found if name != "torch" else None)
        assert entry.version_text().endswith(f"\nApex 0.9, {kernels} its CUDA kernels")
        assert "\ntorch not installed\n" in entry.version_text()


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stf"]) == errors.EXIT_USAGE
    assert capsys.readouterr().err == "hft-megatron: error: 'stf' is not a command; the nearest is hft-megatron sft.\n"
