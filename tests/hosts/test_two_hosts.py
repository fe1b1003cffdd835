"""Two hosts that train together: as one host does, and what becomes of it when a cable or a worker fails."""

import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import NAMES, Node, TwoHosts, wait_for
from tests.support.ranks import REPOSITORY
from tests.support.runs import losses_in, make_inputs

pytestmark = pytest.mark.system(reason="two hosts train, and cables are pulled")

SCRIPT = ("bash", str(REPOSITORY / "examples" / "finetune_llama_hft.sh"))
ITERATIONS, SAVE_INTERVAL = 40, 5
WORDS = f"--train-iters {ITERATIONS} --save-interval {SAVE_INTERVAL} --log-interval 1 --keep-last 3 --lr 1e-3"
SHAPES = "--global-batch-size 8 --micro-batch-size 2 --seq-length 96 --distributed-timeout-minutes 1"
HALF_A_MINUTE = ("--distributed-timeout-minutes", 0.5)
"""For hosts that wait in vain."""
TIMEOUT_S = 30
STARTED_WITHIN_S = 180
CHECKED_BEFORE = """#!/bin/sh
case " $* " in *" --check "*) exit 0 ;; esac
exec "{python}" "$@"
"""
"""Python for the example: its look through the options takes as long as a start of the ranks, and all runs of this file
but the two that are not disturbed go without it."""


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[TwoHosts]:
    hosts = TwoHosts()
    yield hosts
    hosts.close()


@pytest.fixture
def hosts(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    yield two_hosts
    two_hosts.end_all()
    two_hosts.mend()


class Launch:
    """The example with two ranks: one on each host, or both on the first. ``only`` starts what one host would."""

    def __init__(
        self,
        hosts: TwoHosts,
        inputs: Path,
        save: Path,
        *words: object,
        nodes: int = 2,
        only: int | None = None,
        max_restarts: int = 0,
        checked: bool = False,
    ) -> None:
        self.save = save
        settings = {"MODEL": str(inputs / "model"), "DATA": str(inputs / "data.jsonl"), "SAVE": str(save), "TP": "1"}
        settings |= {"NNODES": str(nodes), "GPUS_PER_NODE": str(2 // nodes), "MASTER_ADDR": NAMES[0]}
        settings |= {"MAX_RESTARTS": str(max_restarts), "OMP_NUM_THREADS": "1"}
        settings |= {"PYTHON": sys.executable if checked else str(inputs / "python")}
        command = [*SCRIPT, *WORDS.split(), *SHAPES.split(), *map(str, words)]
        self.nodes: list[Node] = []
        for number in range(nodes) if only is None else [only]:
            name = NAMES[number]
            log = save.with_name(f"{save.name}-{name}.log")
            self.nodes.append(hosts.start(number, command, log=log, settings={**settings, "NODE_RANK": str(number)}))

    def wait_for_iteration(self, number: int) -> None:
        wait_for(lambda: self.iteration() >= number, self.nodes, STARTED_WITHIN_S)

    def iteration(self) -> int:
        """The last that was logged."""
        if not (self.save / "metrics.jsonl").exists():
            return 0
        lines = (self.save / "metrics.jsonl").read_text().splitlines()
        whole = [json.loads(line)["iteration"] for line in lines if line.endswith("}")]
        return int(whole[-1]) if whole else 0

    def saved(self) -> int:
        """Iteration of the newest complete checkpoint."""
        return int((self.save / "latest_checkpointed_iteration.txt").read_text())

    def loaded(self) -> list[int]:
        """The iterations that starts of the ranks have gone on from."""
        found = re.findall(r"successfully loaded checkpoint from .* at iteration (\d+)", self.nodes[0].text())
        return [int(iteration) for iteration in found]

    def end(self, *, within: float = STARTED_WITHIN_S) -> list[int]:
        """The exit codes; ``within`` seconds for all."""
        deadline = time.monotonic() + within
        return [node.code(within=max(0.1, deadline - time.monotonic())) for node in self.nodes]

    def said(self) -> str:
        return "\n".join(f"--- {node.log.name}\n{node.text()[-6000:]}" for node in self.nodes)

    def exported(self) -> str:
        model = self.save / f"hf_iter_{ITERATIONS}" / "model.safetensors"
        return hashlib.sha256(model.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "python").write_text(CHECKED_BEFORE.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def whole(two_hosts: TwoHosts, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Started, and perhaps still running."""
    return Launch(two_hosts, inputs, tmp_path_factory.mktemp("runs") / "whole", checked=True)


@pytest.fixture
def undisturbed(whole: Launch) -> Launch:
    assert whole.end() == [0, 0], whole.said()
    return whole


@pytest.fixture(scope="module")
def strangers(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Launch]]:
    """What two hosts start that have no cable between them."""
    hosts, folder = TwoHosts(), tmp_path_factory.mktemp("strangers")
    try:
        hosts.cut()
        yield [Launch(hosts, inputs, folder / NAMES[number], *HALF_A_MINUTE, only=number) for number in (0, 1)]
    finally:
        hosts.close()


def assert_same_training(run: Launch, other: Launch) -> None:
    assert [line[0] for line in losses_in(run.save)] == list(range(1, ITERATIONS + 1))
    assert losses_in(run.save) == losses_in(other.save)
    assert run.exported() == other.exported()


def test_training_on_two_hosts_is_training_on_one(hosts: TwoHosts, whole: Launch, inputs: Path, tmp_path: Path) -> None:
    one = Launch(hosts, inputs, tmp_path / "one", nodes=1, checked=True)
    assert one.end() == [0], one.said()
    assert whole.end() == [0, 0], whole.said()
    assert "hosts:" not in one.nodes[0].text()
    assert "> 2 hosts: rank 0 on node-a, rank 1 on node-b\n" in whole.nodes[0].text()
    assert not any(node.sentences() for node in whole.nodes)
    assert_same_training(whole, one)


def test_a_link_that_is_away_for_six_seconds_only_delays_the_run(
    hosts: TwoHosts, undisturbed: Launch, inputs: Path, tmp_path: Path
) -> None:
    run = Launch(hosts, inputs, tmp_path / "run")
    run.wait_for_iteration(SAVE_INTERVAL)
    hosts.cut()
    time.sleep(6)
    assert run.iteration() < ITERATIONS
    hosts.mend()
    assert run.end() == [0, 0], run.said()
    assert not any(node.sentences() for node in run.nodes)
    assert_same_training(run, undisturbed)


# Both tests wait for most of their time: these wait side by side.
@pytest.mark.usefixtures("strangers")
def test_a_link_that_stays_away_ends_both_hosts_in_time_with_the_name_of_the_other(
    hosts: TwoHosts, inputs: Path, tmp_path: Path
) -> None:
    run = Launch(hosts, inputs, tmp_path / "run", "--train-iters", 100_000, *HALF_A_MINUTE)
    run.wait_for_iteration(SAVE_INTERVAL)
    hosts.cut()
    assert run.end(within=TIMEOUT_S) == [1, 1], run.said()
    message = "error: no sign of rank 1 on node-b for 15 s: that host, its processes or the network to it are down"
    assert run.nodes[0].sentences() == [f"hft-megatron: {message}"]
    assert run.nodes[1].sentences() == [
        "hft-megatron: error: the rendezvous endpoint node-a:29500 has not answered rank 1 on node-b for 15 s: that "
        "host (rank 0 is on node-a) or the network to it is down"
    ]
    assert json.loads((run.save / "status.json").read_text()) == {
        "exit_code": 1,
        "state": "failed",
        "message": message,
    }


def test_hosts_that_do_not_meet_give_up_in_time_with_the_name_of_the_endpoint(
    strangers: list[Launch],
) -> None:
    for launch in strangers:
        assert launch.end(within=TIMEOUT_S + 60) == [1], launch.said()
        assert launch.nodes[0].lifetime_s() < TIMEOUT_S + 60
        [said] = launch.nodes[0].sentences()
        assert (
            "did not all meet at the rendezvous endpoint node-a:29500 within --distributed-timeout-minutes 0.5" in said
        )


@pytest.mark.parametrize(("seed", "kills"), [(2, 2), (5, 2)])
def test_killed_workers_come_back_to_the_newest_checkpoint_and_lose_nothing_else(
    seed: int, kills: int, hosts: TwoHosts, undisturbed: Launch, inputs: Path, tmp_path: Path
) -> None:
    """Each kill is of a worker and at a moment that are drawn; with these seeds each worker is the first once."""
    drawn = random.Random(seed)
    run = Launch(hosts, inputs, tmp_path / "run", max_restarts=3)
    start = 0
    for kill in range(kills):
        run.wait_for_iteration(start + SAVE_INTERVAL + 1)
        victim = drawn.randrange(2)
        process = run.nodes[victim].ranks()[victim]
        time.sleep(drawn.uniform(0.0, 0.3))
        process.suspend()  # What is looked at stands still.
        saved, at = run.saved(), run.iteration()
        process.kill()
        wait_for(lambda after=kill: len(run.loaded()) > after, run.nodes, STARTED_WITHIN_S)  # type: ignore[misc]
        start = run.loaded()[kill]
        print(f"rank {victim} was killed at iteration {at}, after the checkpoint of {saved}; resumed from {start}")
        # It may have been complete just after it was looked at.
        assert start in (saved, saved + SAVE_INTERVAL)
    assert run.end() == [0, 0], run.said()
    assert len(run.loaded()) == kills
    assert_same_training(run, undisturbed)
