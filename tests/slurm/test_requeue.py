"""The batch file in a real Slurm, on two virtual nodes each time: preempted, and at its time limit."""

import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.runs import losses_in, make_inputs, read_metrics
from tests.support.scheduler import BATCH_FILE as FILE

pytestmark = pytest.mark.system(reason="a scheduler runs whole jobs, and preempts one")

ITERATIONS = 40
WORDS = (
    f"--train-iters {ITERATIONS} --global-batch-size 8 --micro-batch-size 2 --seq-length 96 --log-interval 1".split()
)

STOPS_ONCE = """
trap 'touch "$SAVE/stopped-$NODE_RANK"; exit $((NODE_RANK == 0 ? 3 : 1))' USR1
[[ ! -f $SAVE/stopped-$NODE_RANK ]] || exit 0
touch "$SAVE/running-$NODE_RANK"
while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def exported(save: Path) -> str:
    return hashlib.sha256((save / f"hf_iter_{ITERATIONS}" / "model.safetensors").read_bytes()).hexdigest()


def is_done(job: dict[str, str]) -> bool:
    assert job["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), job
    return job["JobState"] == "COMPLETED"


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Future[str]"]:
    """What a job said that has come to its time limit, on nodes of its own."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit(come_to_the_time_limit, cluster, tmp_path_factory.mktemp("limited"))


def come_to_the_time_limit(cluster: Cluster, folder: Path) -> str:
    """With a stand-in for the example: training is not what is asked."""
    (folder / "examples").mkdir()
    (folder / "examples" / "finetune_llama_hft.sh").write_text(STOPS_ONCE)
    shutil.copy(FILE, folder)
    settings = {"MODEL": "m", "DATA": "d", "SAVE": str(folder / "save"), "PYTHON": sys.executable}
    number = cluster.run("sbatch", "--parsable", "--partition=apart", FILE.name, cwd=folder, **settings)
    output = folder / f"train-llama-hft-{number}.out"
    running = [folder / "save" / f"running-{node}" for node in range(2)]
    cluster.wait_for(number, lambda job: all(path.exists() for path in running), output, 60)

    # 300 s are the lead of the batch file's signal.
    begun = time.monotonic()
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=5")
    cluster.wait_for(number, lambda job: job["Restarts"] == "1", output, 90)
    assert time.monotonic() - begun < 300
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=240", check=False)  # It may be done again.
    cluster.wait_for(number, is_done, output, 60)
    return output.read_text()


# Slurm looks at time limits twice a minute: the job that comes to its own waits beside this test.
@pytest.mark.usefixtures("limited")
def test_a_preempted_run_on_two_nodes_comes_back_by_itself_and_ends_as_an_undisturbed_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    settings = {"MODEL": str(inputs / "model"), "DATA": str(inputs / "data.jsonl"), "SAVE": str(tmp_path / "save")}
    settings |= {"GPUS_PER_NODE": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    submit = ("sbatch", "--parsable", "--array=0-1", f"--chdir={tmp_path}", str(FILE), *WORDS)
    array = cluster.run(*submit, **settings)

    whole, disturbed = tmp_path / "save" / "0", tmp_path / "save" / "1"
    first = cluster.job(f"{array}_0")["JobId"]
    cluster.wait_for(f"{array}_0", is_done, tmp_path / f"train-llama-hft-{first}.out", 600)

    # By the array's number, for which the last task may stand, Slurm shows all tasks.
    task = f"{array}_1"
    number = cluster.job(task)["JobId"]
    output = tmp_path / f"train-llama-hft-{number}.out"
    log = disturbed / "metrics.jsonl"
    cluster.wait_for(task, lambda job: log.exists() and len(read_metrics(disturbed)) >= 3, output, 600)
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=true")
    cluster.wait_for(task, is_done, output, 600)
    assert cluster.job(task)["Restarts"] == "1"
    assert cluster.job(f"{array}_0")["Restarts"] == "0"
    text = output.read_text()
    assert "SIGTERM stopped the run at iteration" in text
    assert f"stopped with a checkpoint in {disturbed}; job {task} goes back into the queue" in text
    logs = sorted((disturbed / "logs").iterdir())
    assert len(logs) == 2, "one of every node"
    assert "loaded checkpoint from" in "".join(file.read_text() for file in logs)

    assert [line[0] for line in losses_in(disturbed)] == list(range(1, ITERATIONS + 1))
    assert losses_in(disturbed) == losses_in(whole)
    assert exported(disturbed) == exported(whole)


def test_the_time_limit_is_announced_early_enough_to_go_back_into_the_queue(limited: "Future[str]") -> None:
    assert "goes back into the queue" in limited.result()
