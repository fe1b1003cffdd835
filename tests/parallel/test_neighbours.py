"""A rank that has ended is named by those of its host. Run: pytest tests/parallel/test_neighbours.py"""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from hft_megatron.errors import PeersLost
from hft_megatron.parallel import neighbours
from hft_megatron.parallel.neighbours import Neighbours, Process
from tests.support.launched import launched
from tests.support.runs import make_inputs, words_for

PROMISED_S = 10.0
"""docs/health.md."""


class Ranks:
    """Processes that stand for the ranks 1 and 2 of this host, and the watch of rank 0, which is this process."""

    def __init__(self) -> None:
        word = [sys.executable, "-c", "import sys; sys.exit(int(sys.stdin.readline()))"]
        self.started = {rank: subprocess.Popen(word, stdin=subprocess.PIPE, text=True) for rank in (1, 2)}
        own = Process.own()
        self.processes = {rank: Process(each.pid, own.namespace) for rank, each in self.started.items()}
        # Of another host: its number means nothing here.
        self.processes |= {0: own, 3: Process(2**22, "elsewhere")}
        self.said: queue.Queue[PeersLost] = queue.Queue()

    def watch(self, rank: int = 0) -> Neighbours:
        found = Neighbours(rank, self.processes, "node-a", self.said.put)
        found.start()
        return found

    def wait_for_end(self, rank: int) -> None:
        """Leaves the status to whoever asks for it."""
        os.waitid(os.P_PID, self.started[rank].pid, os.WEXITED | os.WNOWAIT)

    def exit(self, rank: int, code: int) -> None:
        stdin = self.started[rank].stdin
        assert stdin is not None
        stdin.write(f"{code}\n")
        stdin.close()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    for process in found.started.values():
        process.kill()
        process.wait()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_neighbour_that_is_killed_is_named_with_the_signal_by_the_first_rank_that_is_left(ranks):
    watch = ranks.watch()
    ranks.started[2].kill()
    loss = watch.loss(PROMISED_S)
    assert loss is not None
    assert str(loss).startswith(f"rank 2 on node-a (process {ranks.started[2].pid}) was killed by signal 9 (SIGKILL); ")
    assert loss.speaks
    assert ranks.said.empty()
    ranks.started[1].kill()
    second = ranks.watch(rank=3)
    assert second.loss(0.0) is None, "ranks of other hosts are none of its business"
    second.stop()


def test_a_python_without_pidfd_open_watches_all_the_same(ranks, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    ranks.processes[4] = Process(2**22 + 1, Process.own().namespace)  # above the largest number of a process
    watch = ranks.watch()
    ranks.started[2].kill()
    ranks.wait_for_end(2)
    loss = watch.loss(PROMISED_S)
    assert loss is not None
    assert str(loss).startswith(f"rank 2 on node-a (process {ranks.started[2].pid}) was killed by signal 9 (SIGKILL); ")


def test_of_an_error_and_a_death_it_is_the_death_that_is_told(ranks):
    ranks.exit(1, 7)
    ranks.wait_for_end(1)
    ranks.started[2].kill()
    ranks.wait_for_end(2)
    ranks.processes[4] = ranks.processes.pop(0)
    loss = ranks.watch(rank=4).loss(PROMISED_S)
    assert loss is not None
    assert "rank 2 on node-a" in str(loss)
    assert not loss.speaks, "rank 1 has ended by itself, and has had its say"


def test_who_is_killed_too_is_no_speaker(ranks):
    ranks.processes[4] = ranks.processes.pop(0)
    for process in ranks.started.values():
        process.kill()
    for rank in ranks.started:
        ranks.wait_for_end(rank)
    loss = ranks.watch(rank=4).loss(PROMISED_S)
    assert loss is not None
    assert loss.speaks


@pytest.mark.parametrize(("code", "speaks"), [(7, True), (1, False)], ids=["unheard of", "said by that rank itself"])
def test_a_rank_that_waits_in_a_collective_is_ended_by_its_thread(ranks, monkeypatch, code, speaks):
    monkeypatch.setattr(neighbours, "GRACE_ENDED_S", 0.2)
    ranks.watch()
    ranks.exit(1, code)
    loss = ranks.said.get(timeout=PROMISED_S)
    assert "rank 1 on node-a" in str(loss)
    assert str(loss).endswith(f"ended with exit code {code}; its output is in the log of its host")
    assert loss.speaks == speaks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_rank_that_ends_by_itself_says_nothing_of_others(ranks, monkeypatch):
    monkeypatch.setattr(neighbours, "GRACE_KILLED_S", 0.2)
    watch = ranks.watch()
    ranks.started[1].kill()
    watch.stop()
    time.sleep(0.5)
    assert ranks.said.empty()


def test_the_launchers_signal_after_a_death_is_an_error_with_its_name(ranks):
    watch = ranks.watch()
    ranks.started[1].kill()
    ranks.wait_for_end(1)
    with pytest.raises(PeersLost, match=r"rank 1 on node-a .* signal 9"):
        signal.raise_signal(signal.SIGTERM)
    watch.stop()


def test_the_launchers_signal_to_all_ends_this_rank_as_ever(ranks):
    watch = ranks.watch()
    ranks.started[1].terminate()
    ranks.wait_for_end(1)
    with patch.object(neighbours.os, "kill") as killed:
        signal.raise_signal(signal.SIGTERM)
    killed.assert_called_once_with(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    watch.stop()


@pytest.mark.parametrize(
    ("layout", "killed"),
    [
        pytest.param("", 1, id="dp2"),
        pytest.param("--tensor-model-parallel-size 2", 0, id="tp2"),
        pytest.param(
            "--global-batch-size 3",
            0,
            id="dp3",
            marks=pytest.mark.slow(reason="three started ranks: one of several must speak"),
        ),
    ],
)
def test_a_rank_that_is_killed_in_training_is_named_in_one_sentence_within_the_promised_time(
    tmp_path: Path, request: pytest.FixtureRequest, layout: str, killed: int
) -> None:
    save = tmp_path / "run"
    words = words_for(make_inputs(tmp_path), *layout.split(), "--train-iters", 5000, "--save", save)
    words += ["--lr-decay-style", "constant"]
    ranks = 3 if request.node.callspec.id == "dp3" else 2
    with launched(words, ranks=ranks, log=tmp_path / "log") as run:
        metrics = save / "metrics.jsonl"
        run.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
        process = run.rank(killed)
        process.kill()
        begun = time.monotonic()
        run.wait_for(lambda: run.sentences(), seconds=PROMISED_S)
        said_after = time.monotonic() - begun
        code, _ = run.end(within=60)
    [sentence] = run.sentences()
    assert sentence.startswith(f"hft-megatron: error: rank {killed} on ")
    assert "was killed by signal 9 (SIGKILL)" in sentence
    assert said_after < PROMISED_S
    assert code == 1
    assert "gloo" not in run.text()
    assert (save / "status.json").read_text().startswith('{"exit_code": 1, "state": "failed", "message": "error: rank ')
