"""What examples/slurm/finetune_llama_hft.sbatch starts, with stand-ins for Slurm's commands that note their words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import REPOSITORY

FILE = REPOSITORY / "examples" / "slurm" / "finetune_llama_hft.sbatch"
STAND_IN = """#!{python}
import json, os, pathlib, sys
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps({{"command": name, "words": words, "environment": dict(os.environ)}}) + "\\n")
if name == "scontrol":
    print("n7 n8".replace(" ", "\\n") if "hostnames" in words else "NodeName=n7 NodeAddr=10.0.0.7 NodeHostName=n7")
if name == "srun":
    sys.exit(int(os.environ.get("STAND_IN_CODE", "0")))
"""


class Job:
    """The batch file as a job on two nodes would run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "log"
        for name in ("srun", "scontrol"):
            (folder / name).write_text(STAND_IN.format(python=sys.executable, log=str(self._log)))
            (folder / name).chmod(0o755)

    def run(self, *words: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        given = {"MODEL": "/models/m", "DATA": "/data/d.jsonl", "SLURM_JOB_ID": "41234", "SLURM_JOB_NAME": "name"}
        given |= {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96"}
        given |= {"SLURM_SUBMIT_DIR": str(self.folder), "SLURM_GPUS_ON_NODE": "8", **settings}
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", **{k: v for k, v in given.items() if v != ""}}
        return subprocess.run(
            ["bash", str(FILE), *words], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def calls(self, command: str) -> list[dict[str, object]]:
        calls = [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []
        return [call for call in calls if call["command"] == command]

    def step(self) -> tuple[list[str], dict[str, str]]:
        """Words and environment of the only srun."""
        (call,) = self.calls("srun")
        return call["words"], call["environment"]  # type: ignore[return-value]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def header(option: str) -> str:
    (value,) = re.findall(rf"^#SBATCH --{option}=(.+)$", FILE.read_text(), re.MULTILINE)
    return str(value)


def test_the_signal_leads_by_the_ranks_time_to_save_and_30_s_more(job: Job) -> None:
    assert job.run().returncode == 0
    lead = re.fullmatch(r"B:USR1@(\d+)", header("signal"))
    assert lead is not None
    assert int(lead[1]) == int(job.step()[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 30
    assert re.findall(r"^#SBATCH --requeue$", FILE.read_text(), re.MULTILINE)
    assert header("open-mode") == "append", "a requeued job would overwrite what it said before"


def test_every_node_gets_its_place_and_every_core(job: Job) -> None:
    assert job.run("--lr", "1e-4").returncode == 0
    words, environment = job.step()
    assert words[words.index("--cpus-per-task") + 1] == "96"
    assert words[-3:] == [f"{job.folder}/examples/finetune_llama_hft.sh", "--lr", "1e-4"]
    place = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "21234", "NNODES": "2", "GPUS_PER_NODE": "8"}
    assert {name: environment[name] for name in place} == place
    node = subprocess.run(
        [*words[words.index("bash") : words.index("bash") + 4], "-c", 'echo "$NODE_RANK"'],
        env={**environment, "SLURM_NODEID": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert node.stdout == "1\n"


def test_tasks_of_an_array_and_jobs_share_no_folder_and_no_output(job: Job) -> None:
    assert "%j" in header("output")
    assert "%a" not in header("output"), "outside an array that is a number of ten digits"
    expected = {
        "runs/name-41234": {},
        "runs/name-41200/3": {"SLURM_ARRAY_JOB_ID": "41200", "SLURM_ARRAY_TASK_ID": "3"},
        "mine": {"SAVE": f"{job.folder}/mine"},
        "mine/3": {"SAVE": f"{job.folder}/mine", "SLURM_ARRAY_JOB_ID": "41200", "SLURM_ARRAY_TASK_ID": "3"},
    }
    for folder, settings in expected.items():
        assert job.run(**settings).returncode == 0
        assert job.calls("srun")[-1]["environment"]["SAVE"] == f"{job.folder}/{folder}"  # type: ignore[index]


def test_one_variable_chooses_apptainer_or_pyxis(job: Job) -> None:
    assert job.run(CONTAINER="/images/hft.sif").returncode == 0
    assert job.run(CONTAINER="registry#hft-megatron:gpu", MOUNTS="/models,/data").returncode == 0
    apptainer, pyxis = (call["words"] for call in job.calls("srun"))
    assert isinstance(apptainer, list)
    assert isinstance(pyxis, list)
    start = apptainer.index("apptainer")
    mounts = f"/models/m,/data/d.jsonl,{job.folder}/runs/name-41234"
    assert apptainer[start : start + 6] == ["apptainer", "exec", "--nv", "--bind", mounts, "/images/hft.sif"]
    assert pyxis[pyxis.index("--container-image") + 1] == "registry#hft-megatron:gpu"
    assert pyxis[pyxis.index("--container-mounts") + 1] == "/models:/models,/data:/data"
    assert apptainer[-1] == pyxis[-1] == "/opt/hft_megatron/examples/finetune_llama_hft.sh"


@pytest.mark.parametrize(("code", "requeued"), [("0", 0), ("1", 0), ("2", 0), ("3", 1)])
def test_only_a_run_that_stopped_with_a_checkpoint_goes_back_into_the_queue(job: Job, code: str, requeued: int) -> None:
    assert job.run(STAND_IN_CODE=code).returncode == int(code)
    asked = [call["words"] for call in job.calls("scontrol") if "requeue" in call["words"]]  # type: ignore[operator]
    assert asked == [["requeue", "41234"]] * requeued


def test_of_an_array_only_the_stopped_task_goes_back(job: Job) -> None:
    job.run(STAND_IN_CODE="3", SLURM_JOB_ID="41200", SLURM_ARRAY_JOB_ID="41200", SLURM_ARRAY_TASK_ID="1")
    assert job.calls("scontrol")[-1]["words"] == ["requeue", "41200_1"]


def test_a_job_without_data_is_a_mistake_that_starts_nothing(job: Job) -> None:
    result = job.run(DATA="")
    assert result.returncode == 2
    assert result.stderr == "hft-megatron: error: DATA is not set; give MODEL and DATA in the environment of sbatch.\n"
    assert job.calls("srun") == []
