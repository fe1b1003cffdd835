"""The Python part of the GPU image, on CPU: what pip makes of its base, and two iterations through its entry point.

It runs where the interpreter is as new as the image's: .ci/newer-python.sh makes such an environment.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import REPOSITORY
from tests.support.runs import make_inputs, read_metrics

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="the GPU image has Python 3.12, and this is older")


def run(*command: object, **settings: str) -> str:
    words = [str(word) for word in command]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **settings}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pip_is_content_with_what_the_base_brings_and_replaces_none_of_it(tmp_path: Path) -> None:
    brought = tmp_path / "brought.txt"
    brought.write_text(run(sys.executable, "docker/build/brought.py", "torch"))
    assert {"torch", "triton", "numpy"} <= {line.partition("==")[0] for line in brought.read_text().splitlines()}
    words = ["install", "--dry-run", "--no-build-isolation", "--constraint", brought, ".[formats]"]
    output = run(sys.executable, "-m", "pip", *words)
    [made] = [line for line in output.splitlines() if line.startswith("Would install")]
    assert made.split()[2:] == [one for one in made.split() if one.startswith("hft-megatron-")]


def test_the_entry_point_trains_two_iterations_of_the_example(tmp_path: Path) -> None:
    inputs, save = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    settings = {"MODEL": str(inputs / "model"), "DATA": str(inputs / "data.jsonl"), "SAVE": str(save)}
    words = ["--train-iters", 2, "--global-batch-size", 4, "--micro-batch-size", 2, "--seq-length", 96]
    script = "examples/finetune_llama_hft.sh"
    run("bash", "docker/entrypoint.sh", "bash", script, *words, GPUS_PER_NODE="2", TP="2", **settings)
    assert [record["iteration"] for record in read_metrics(save) if "grad norm" in record] == [2]
    assert (save / "hf_iter_2" / "model.safetensors").exists()
