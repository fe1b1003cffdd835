"""The ways to start the example that the README promises, with real ranks on a tiny model."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.preferences import write_pairs
from tests.support.ranks import REPOSITORY
from tests.support.runs import make_inputs, read_metrics

SHORT = ("--train-iters", "2", "--global-batch-size", "8", "--micro-batch-size", "2", "--seq-length", "96")

PREPARE = """
import argparse, os
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
output = parser.parse_args().output
output.mkdir(parents=True, exist_ok=True)
for name, link in (("model", "model"), ("data.jsonl", "train.jsonl"), ("pairs.jsonl", "pairs.jsonl")):
    try:
        (output / link).symlink_to({inputs!r} + "/" + name)
    except FileExistsError:
        pass
print("the demo's model and data are here")
"""


@dataclass
class Clone:
    """A clone of the repository whose demo is a tiny model that takes no time to make."""

    root: Path
    inputs: Path

    def start(self, *command: str, **settings: str) -> "subprocess.Popen[str]":
        """Start a command as a person would with .venv active, in the clone's folder."""
        removed = ("RANK", "WORLD_SIZE", "PYTHON", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in removed}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        environment |= settings
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.root, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *command: str, **settings: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        with self.start(*command, **settings) as process:
            try:
                output, errors = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise
        return process.returncode, output, errors

    def runs(self) -> set[Path]:
        return {path for method in ("sft", "dpo") for path in (self.root / "runs").glob(f"{method}-*")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    folder = tmp_path_factory.mktemp("example")
    inputs = make_inputs(folder / "inputs")
    write_pairs(inputs / "pairs.jsonl", 24)
    root = folder / "clone"
    (root / "examples").mkdir(parents=True)
    (root / "hft_megatron").symlink_to(REPOSITORY / "hft_megatron")
    for script in ("finetune_llama_hft.sh", "dpo_llama_hft.sh", "start.sh"):
        shutil.copy(REPOSITORY / "examples" / script, root / "examples" / script)
    (root / "tools" / "demo").mkdir(parents=True)
    (root / "tools" / "demo" / "prepare.py").write_text(PREPARE.format(inputs=str(inputs)))
    return Clone(root=root, inputs=inputs)


@pytest.mark.slow(reason="real starts: torchrun, a check and every rank import everything")
@pytest.mark.parametrize(
    ("command", "layout"),
    [
        ("torchrun examples/finetune_llama_hft.sh", "TP 1 x PP 1 x DP 1"),
        ("torchrun --nproc-per-node 4 examples/finetune_llama_hft.sh --train-iters 50", "TP 2 x PP 1 x DP 2"),
        pytest.param("bash examples/finetune_llama_hft.sh", "TP 2 x PP 1 x DP 1", marks=pytest.mark.engine),
        ("torchrun --no-python examples/finetune_llama_hft.sh", "TP 1 x PP 1 x DP 1"),
        # The other two ways are start.sh's, which both scripts share: of each half of this file one way is enough.
        ("torchrun examples/dpo_llama_hft.sh", "TP 1 x PP 1 x DP 1"),
        ("bash examples/dpo_llama_hft.sh", "TP 2 x PP 1 x DP 1"),
    ],
)
def test_every_way_to_start_trains_the_demo_model_in_one_new_folder(clone: Clone, command: str, layout: str) -> None:
    before = clone.runs()
    code, output, errors = clone.run(*command.split(), *SHORT, XDG_CACHE_HOME=str(clone.root / "cache"))
    assert code == 0, errors
    assert output.count("the demo's model and data are here") == 1
    assert f"> {layout} on cpu" in output
    (run,) = clone.runs() - before
    assert [record["iteration"] for record in read_metrics(run) if "grad norm" in record] == [2]
    assert (run / "hf_iter_2" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words", "named"),
    [
        ({"TP": "3", "GPUS_PER_NODE": "3"}, (), "--tensor-model-parallel-size 3"),
        ({}, ("--hft-ratio", "1.5"), "--hft-ratio 1.5"),
        ({}, ("--trian-iters", "5"), "--train-iters"),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence_under_bash(
    clone: Clone, settings: dict[str, str], words: tuple[str, ...], named: str
) -> None:
    given = {"MODEL": str(clone.inputs / "model"), "DATA": str(clone.inputs / "data.jsonl"), "GPUS_PER_NODE": "2"}
    code, _, errors = clone.run("bash", "examples/finetune_llama_hft.sh", *SHORT, *words, **{**given, **settings})
    assert code == 2
    assert errors.startswith("hft-megatron: error: ")
    assert errors.count("\n") == 1
    assert named in errors


@pytest.mark.slow(reason="two real starts, each with a check, torchrun and two ranks")
def test_a_stopped_run_reports_3_and_the_same_command_resumes_it(clone: Clone, tmp_path: Path) -> None:
    given = {"MODEL": str(clone.inputs / "model"), "DATA": str(clone.inputs / "data.jsonl"), "GPUS_PER_NODE": "2"}
    words = ("bash", "examples/finetune_llama_hft.sh", *SHORT, "--log-interval", "1", "--train-iters")
    process = clone.start(*words, "100000", SAVE=str(tmp_path), **given)
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 3, errors
    stopped_at = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"

    code, _, errors = clone.run(*words, str(stopped_at + 1), SAVE=str(tmp_path), **given)
    assert code == 0, errors
    assert [record["iteration"] for record in read_metrics(tmp_path)] == list(range(1, stopped_at + 2))


@pytest.mark.slow(reason="two real starts, and three seconds of training")
def test_a_run_that_lasts_as_long_as_it_may_reports_3_and_one_that_loses_a_rank_reports_1(
    clone: Clone, tmp_path: Path
) -> None:
    given = {"MODEL": str(clone.inputs / "model"), "DATA": str(clone.inputs / "data.jsonl"), "GPUS_PER_NODE": "2"}
    words = ("bash", "examples/finetune_llama_hft.sh", *SHORT, "--log-interval", "1", "--train-iters", "100000")
    alone = {**given, "GPUS_PER_NODE": "1"}
    code, _, errors = clone.run(*words, "--exit-duration-in-mins", "0.05", SAVE=str(tmp_path / "late"), **alone)
    assert code == 3, errors
    iteration = (tmp_path / "late" / "latest_checkpointed_iteration.txt").read_text().strip()
    assert errors.rstrip().endswith(
        f"hft-megatron: --exit-duration-in-mins 0.05 stopped the run at iteration {iteration}; resume it with "
        f"--load {tmp_path / 'late'}"
    )

    save = tmp_path / "killed"
    process = clone.start(*words, SAVE=str(save), **given)
    deadline = time.monotonic() + 300
    while not (save / "metrics.jsonl").exists() or not read_metrics(save):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # Others come and go.
            if "RANK" in child.environ():
                ranks.append(child)
    ranks[-1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
