"""Real processes that are killed or asked to stop, and resume to the same bits."""

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hft_megatron.errors import EXIT_OK, EXIT_STOPPED
from tests.support.forked import Started, kill_all
from tests.support.runs import losses_in, make_inputs, read_metrics, run_cli, start_cli, words_for

pytestmark = pytest.mark.slow(reason="every run is 80 steps of two ranks long, so that a signal comes in its middle")

STEPS = 80
SAVE_INTERVAL = 10
CAUGHT_AT = 13
"""Line of metrics.jsonl at which the run is stopped: after a checkpoint, and not at one."""


def wait_for_line(file: Path, number: int, process: Started, log: Path) -> None:
    deadline = time.monotonic() + 180
    while not file.exists() or len(file.read_text().splitlines()) < number:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)


def command(folder: Path, name: str) -> list[str]:
    """A run in ``folder/name`` on the inputs in ``folder``, one micro-batch a step."""
    run = str(folder / name)
    layout = ("--tensor-model-parallel-size", 2, "--micro-batch-size", 2, "--global-batch-size", 2)
    folders = ("--save", run, "--load", run, "--save-interval", SAVE_INTERVAL, "--save-hf", f"{run}-hf")
    return words_for(folder, "--train-iters", STEPS, *layout, *folders)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and the run that nobody stopped in ``whole``."""
    folder = make_inputs(tmp_path_factory.mktemp("interrupted"))
    log = folder / "log"
    assert run_cli(command(folder, "whole"), ranks=2, log=log) == EXIT_OK, log.read_text()[-4000:]
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_and_started_again_is_the_run_that_was_not(how: signal.Signals, folder: Path) -> None:
    log, stopped = folder / "log", folder / how.name
    process = start_cli(command(folder, how.name), ranks=2, log=log)
    try:
        wait_for_line(stopped / "metrics.jsonl", CAUGHT_AT, process, log)
        if how == signal.SIGTERM:
            os.kill(process.pid, how)  # torchrun passes it on
            process.wait(60)
    finally:
        if process.poll() is None:
            kill_all(process)
            process.wait()
    done = len((stopped / "metrics.jsonl").read_text().splitlines())
    saved = int((stopped / "latest_checkpointed_iteration.txt").read_text())
    assert SAVE_INTERVAL <= saved <= done < STEPS, "the run must be caught in the middle"
    assert saved == done or how == signal.SIGKILL, "a signal saves the step it ends with"
    assert not (folder / f"{how.name}-hf").exists()

    assert run_cli(command(folder, how.name), ranks=2, log=log) == EXIT_OK, log.read_text()[-4000:]
    assert "successfully loaded checkpoint" in log.read_text()
    assert len(losses_in(folder / "whole")) == STEPS
    assert losses_in(stopped) == losses_in(folder / "whole")
    exported = [load_file(folder / f"{name}-hf" / "model.safetensors") for name in (how.name, "whole")]
    assert exported[0].keys() == exported[1].keys()
    assert all((exported[0][name] == exported[1][name]).all() for name in exported[0])


def test_sigterm_ends_a_single_process_with_exit_code_3_and_a_restart_resumes(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    run = tmp_path / "run"
    words = words_for(inputs, "--train-iters", 2000, "--lr-decay-style", "constant", "--save", run, "--load", run)
    log = tmp_path / "log"
    process = start_cli(words, log=log)
    try:
        wait_for_line(run / "metrics.jsonl", 3, process, log)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == EXIT_STOPPED, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    stopped_at = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert f"SIGTERM stopped the run at iteration {stopped_at}" in log.read_text()
    assert (run / "status.json").read_text().startswith('{"exit_code": 3, "state": "stopped"')
    assert run_cli([*words, "--train-iters", str(stopped_at + 2)], log=log) == EXIT_OK, log.read_text()[-4000:]
    assert [line["iteration"] for line in read_metrics(run)] == list(range(1, stopped_at + 3))
