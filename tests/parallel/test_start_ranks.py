"""Ranks started as torchrun does, and how that ends. Run: pytest tests/parallel/test_start_ranks.py"""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing import SignalException

from hft_megatron import errors
from hft_megatron.cli import boundary
from hft_megatron.parallel import start_ranks
from hft_megatron.parallel.start_ranks import code_after_signal, judged, worst
from tests.support import forked

RANK = """
import os, signal, sys, time
from pathlib import Path
from hft_megatron import errors
from hft_megatron.cli import boundary
folder, what = Path(sys.argv[1]), sys.argv[2:]
received = []

def command(status):
    if os.environ["RANK"] == "0" and what[0] != "all":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)  # torchrun's code ends it
    if what[-1] == "sleeps":
        (folder / os.environ["RANK"]).touch()
        time.sleep(60)
    if what[-1] == "waits":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: received.append(number))
        (folder / os.environ["RANK"]).touch()
        while not received:
            time.sleep(0.01)
        what[-1] = folder.joinpath("then").read_text()
    outcomes = {"mistake": errors.UserError("Wrong."), "stopped": errors.Stopped("Saved.")}
    if what[-1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what[-1] != "finished":
        raise outcomes.get(what[-1]) or RuntimeError("broken")

boundary.OTHER_RANKS_WAIT_S = 0
sys.exit(boundary.run_command(command))
"""


def failure(code: int, local_rank: int = 0) -> Any:
    return SimpleNamespace(exitcode=code, local_rank=local_rank, pid=7)


def test_a_mistake_explains_all_else_and_a_failure_counts_more_than_a_stop() -> None:
    assert worst([]) == worst([0, 0]) == errors.EXIT_OK
    assert worst([0, 3]) == errors.EXIT_STOPPED
    assert worst([3, 1]) == errors.EXIT_FAILURE
    assert worst([1, 2, 3]) == errors.EXIT_USAGE


def test_ranks_that_could_say_nothing_get_a_line_and_those_that_torchrun_ended_none() -> None:
    assert judged([failure(2), failure(1, 1)]) == ([], errors.EXIT_USAGE)
    assert judged([failure(3), failure(-signal.SIGTERM, 1)]) == ([], errors.EXIT_STOPPED)
    ends = [failure(-signal.SIGKILL, 3), failure(-signal.SIGTERM, 1), failure(1, 2), failure(9, 4)]
    lines, code = judged(ends)
    assert code == errors.EXIT_FAILURE
    assert lines == [
        "local rank 3 (process 7) was killed by SIGKILL",
        "local rank 4 (process 7) ended with exit code 9",
    ]


def test_after_a_signal_a_run_has_finished_where_all_ranks_have() -> None:
    assert code_after_signal({0: 0, 1: 0}, ranks=2) == errors.EXIT_OK
    assert code_after_signal({0: 3, 1: 3}, ranks=2) == errors.EXIT_STOPPED
    assert code_after_signal({0: 3}, ranks=2) == errors.EXIT_STOPPED
    assert code_after_signal({0: 0}, ranks=2) is None
    assert code_after_signal({}, ranks=2) is None


@pytest.mark.parametrize(("missing", "code"), [(0, errors.EXIT_OK), (1, errors.EXIT_STOPPED)])
def test_a_number_of_ranks_that_torchrun_itself_finds_is_counted_as_it_does(
    missing: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object) -> None:
        for rank in range(torch.distributed.run.determine_local_world_size("cpu") - missing):
            Path(os.environ[errors.EXIT_CODES_VARIABLE], str(rank)).write_text(str(errors.EXIT_OK))
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setenv(errors.EXIT_CODES_VARIABLE, "")
    monkeypatch.setattr(torch.distributed.run, "run", run)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        assert start_ranks.main(["--nproc-per-node", "cpu", "rank.py"]) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_rank_that_is_started_again_takes_back_the_code_of_its_earlier_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), (errors.EXIT_CODES_VARIABLE, str(tmp_path))):
        monkeypatch.setenv(name, value)
    left = tmp_path / "1"
    left.write_text(str(errors.EXIT_FAILURE))
    there = []
    assert boundary.run_command(lambda status: there.append(left.exists())) == errors.EXIT_OK
    assert there == [False]
    assert left.read_text() == str(errors.EXIT_OK)


@pytest.fixture(scope="module", autouse=True)
def ready() -> None:
    forked.await_server()


def start(folder: Path, *what: str, restarts: int = 0) -> forked.Started:
    """Two ranks of which the second one, or under ``all`` both, come to the end that ``what`` names."""
    folder.mkdir(exist_ok=True)
    (folder / "rank.py").write_text(RANK)
    words = forked.torchrun(2)
    words[words.index("torch.distributed.run")] = "hft_megatron.parallel.start_ranks"
    words += ["--max-restarts", str(restarts), str(folder / "rank.py"), str(folder), *what]
    return forked.start(words, output=folder / "output", errors=folder / "errors")


def test_a_mistake_and_a_stop_are_one_sentence_with_their_code_and_no_trace_of_torchruns(tmp_path: Path) -> None:
    processes = {
        "mistake": start(tmp_path / "mistake", "one", "mistake"),
        "stopped": start(tmp_path / "stopped", "all", "stopped", restarts=2),
        "killed": start(tmp_path / "killed", "one", "killed"),
        "broken": start(tmp_path / "broken", "one", "broken"),
    }
    codes = {name: process.wait(120) for name, process in processes.items()}
    said = {name: (tmp_path / name / "errors").read_text() for name in processes}
    assert codes == {"mistake": 2, "stopped": 3, "killed": 1, "broken": 1}, said
    assert said["mistake"].startswith("hft-megatron: rank 1 on ")
    assert said["mistake"].endswith(": error: Wrong.\n")
    assert said["mistake"].count("\n") == 1
    assert said["stopped"] == "hft-megatron: Saved.\n"
    assert "Traceback" not in said["killed"]
    assert said["killed"].splitlines()[-1].endswith(") was killed by SIGKILL")
    assert said["broken"].count("Traceback") == said["broken"].count("RuntimeError: broken") == 1
    assert "failed (exitcode: 1) local_rank: 1 " in said["broken"], "whose trace that is"


@pytest.mark.parametrize(("sent", "then", "code"), [("SIGTERM", "finished", 0), ("SIGINT", "stopped", 3)])
def test_after_a_signal_the_code_is_what_the_ranks_came_to(tmp_path: Path, sent: str, then: str, code: int) -> None:
    (tmp_path / "then").write_text(then)
    process = start(tmp_path, "all", "waits")
    deadline = time.monotonic() + 60
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert process.poll() is None, (tmp_path / "errors").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, getattr(signal, sent))
    assert process.wait(60) == code
    assert (tmp_path / "errors").read_text() == ("hft-megatron: Saved.\n" if code else "")


def test_a_signal_that_ranks_have_no_answer_to_is_one_sentence(tmp_path: Path) -> None:
    process = start(tmp_path, "all", "sleeps")
    deadline = time.monotonic() + 60
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert process.poll() is None, (tmp_path / "errors").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == errors.EXIT_STOPPED
    assert (tmp_path / "errors").read_text() == (
        "hft-megatron: SIGTERM stopped the run before it could save; run the command again to resume from its newest "
        "checkpoint, if there is one\n"
    )
