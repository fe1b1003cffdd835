"""docker/compose.yaml: two containers that train together."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.daemons import skip_without
from tests.support.engine import Engine
from tests.support.ranks import REPOSITORY
from tests.support.runs import read_metrics

pytestmark = pytest.mark.system(reason="two containers train")


def test_two_containers_train_one_model_in_one_folder(engine: Engine, image: str, inputs: Path) -> None:
    skip_without("docker-compose")
    settings = {"INPUTS": str(inputs), "MODEL": "/inputs/model", "DATA": "/inputs/data.jsonl", "IMAGE": image}
    settings["ARGS"] = "--train-iters 4 --global-batch-size 8 --micro-batch-size 2 --seq-length 96 --log-interval 1"
    # Debian's docker-compose is a Python program, with packages of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"DOCKER_HOST": engine.address, **settings}
    compose = ["docker-compose", "--file", str(REPOSITORY / "docker" / "compose.yaml"), "--project-name", "two"]

    def run(*words: str) -> str:
        done = subprocess.run([*compose, *words], env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("up", "--detach", "--no-build")
    try:
        containers = run("ps", "--quiet").split()
        assert len(containers) == 2
        codes = engine.docker("wait", *containers, timeout=180).stdout.split()
        logs = run("logs", "--no-color")
        assert codes == ["0", "0"], logs
        assert "TP 2 x PP 1 x DP 1 on cpu" in logs
        save = engine.data / "volumes" / "two_runs" / "_data" / "two-nodes"
        assert [record["iteration"] for record in read_metrics(save)] == [1, 2, 3, 4]
        assert (save / "hf_iter_4" / "model.safetensors").exists()
    finally:
        run("down", "--volumes")
