"""Two hosts that train together: as one host does, and what becomes of it when a cable, a host or a worker fails."""

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import NAMES, Node, TwoHosts, wait_for
from tests.support.ranks import REPOSITORY
from tests.support.runs import losses_in, make_inputs, read_metrics

pytestmark = pytest.mark.system

SCRIPT = ("bash", str(REPOSITORY / "examples" / "finetune_llama_hft.sh"))
SHORT = "--global-batch-size 8 --micro-batch-size 2 --seq-length 96 --log-interval 1 --lr-decay-style constant".split()
ITERATIONS = 60


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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Launch:
    """The example on both hosts, with one rank each."""

    def __init__(self, hosts: TwoHosts, inputs: Path, save: Path, *words: object, max_restarts: int = 0) -> None:
        self.save = save
        settings = {"MODEL": str(inputs / "model"), "DATA": str(inputs / "data.jsonl"), "SAVE": str(save), "TP": "1"}
        settings |= {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": NAMES[0], "OMP_NUM_THREADS": "1"}
        settings["MAX_RESTARTS"] = str(max_restarts)
        command = [*SCRIPT, *SHORT, *map(str, words)]
        self.nodes: list[Node] = []
        for number, name in enumerate(NAMES):
            log = save.with_name(f"{save.name}-{name}.log")
            self.nodes.append(hosts.start(number, command, log=log, settings={**settings, "NODE_RANK": str(number)}))

    def wait_for_iteration(self, number: int) -> None:
        wait_for(lambda: self.iteration() >= number, self.nodes, 180)

    def iteration(self) -> int:
        """The last that was logged."""
        if not (self.save / "metrics.jsonl").exists():
            return 0
        lines = (self.save / "metrics.jsonl").read_text().splitlines()
        with_number = [json.loads(line)["iteration"] for line in lines if line.endswith("}")]
        return int(with_number[-1]) if with_number else 0

    def end(self, *, within: float = 180) -> list[int]:
        """The exit codes; ``within`` seconds for both."""
        deadline = time.monotonic() + within
        return [node.code(within=max(0.1, deadline - time.monotonic())) for node in self.nodes]


def exported(save: Path) -> str:
    (model,) = save.glob("hf_iter_*/model.safetensors")
    return hashlib.sha256(model.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(two_hosts: TwoHosts, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    launch = Launch(two_hosts, inputs, tmp_path_factory.mktemp("runs") / "whole", "--train-iters", ITERATIONS)
    assert launch.end() == [0, 0], launch.nodes[0].text() + launch.nodes[1].text()
    return launch


def test_training_on_two_hosts_is_training_on_one(undisturbed: Launch, inputs: Path, tmp_path: Path) -> None:
    assert "> 2 hosts: rank 0 on node-a, rank 1 on node-b\n" in undisturbed.nodes[0].text()
    assert not any(node.sentences() for node in undisturbed.nodes)
