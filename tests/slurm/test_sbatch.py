"""What examples/slurm/train_llama_hft.sbatch starts, with the stand-ins of tests/support/scheduler.py for Slurm."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.ranks import REPOSITORY
from tests.support.scheduler import BATCH_FILE, NODES, Job

EXAMPLE = """
echo "$(basename "$0") on node $NODE_RANK of $NNODES: $*"
exit "${EXAMPLE_CODE:-0}"
"""
"""In place of the examples: training is not what is asked."""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    examples = tmp_path / "stand-ins"
    (examples / "slurm").mkdir(parents=True)
    (examples / "slurm" / "mounts.sh").symlink_to(REPOSITORY / "examples" / "slurm" / "mounts.sh")
    for name in ("finetune_llama_hft.sh", "dpo_llama_hft.sh", "run_hft.sh"):
        (examples / name).write_text(EXAMPLE)
    work = tmp_path / "work"
    work.mkdir()
    return Job(work, examples=examples)


def header(option: str) -> str:
    (value,) = re.findall(rf"^#SBATCH --{option}=(.+)$", BATCH_FILE.read_text(), re.MULTILINE)
    return str(value)


def value_of(option: str, words: list[str]) -> str:
    return words[words.index(option) + 1]


def test_the_signal_leads_by_the_ranks_time_to_save_and_30_s_more(job: Job) -> None:
    assert job.run() == 0
    lead = re.fullmatch(r"B:USR1@(\d+)", header("signal"))
    assert lead is not None
    assert int(lead[1]) == int(job.step()[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 30
    assert re.findall(r"^#SBATCH --requeue$", BATCH_FILE.read_text(), re.MULTILINE)
    assert header("open-mode") == "append", "a requeued job would overwrite what it said before"
    assert value_of("--open-mode", job.step()[0]) == "append"


def test_every_node_gets_its_place_every_core_and_a_log_with_its_number(job: Job) -> None:
    assert job.run("--lr", "1e-4", "two words") == 0
    words, environment = job.step()
    assert value_of("--cpus-per-task", words) == "96"
    place = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "21234", "NNODES": "2", "GPUS_PER_NODE": "8"}
    assert {name: environment[name] for name in place} == place
    logs = job.folder / "runs" / "name-41234" / "logs"
    for number in range(len(NODES)):
        line = f"{number}: finetune_llama_hft.sh on node {number} of 2: --lr 1e-4 two words\n"
        assert (logs / f"41234-node-{number}.log").read_text() == line
        assert line in job.said(), "the last line of every node"
    assert f"tail -f {logs}/41234-*.log" in job.said()


@pytest.mark.parametrize(
    ("settings", "started"),
    [
        ({}, "finetune_llama_hft.sh on node 0 of 2: --lr 1"),
        ({"METHOD": "dpo"}, "dpo_llama_hft.sh on node 0 of 2: --lr 1"),
        ({"METHOD": "pretrain"}, "run_hft.sh on node 0 of 2: pretrain --lr 1"),
        ({"METHOD": "pretrain", "MODEL": "", "DATA": ""}, "run_hft.sh on node 0 of 2: pretrain --lr 1"),
        ({"METHOD": "dpo", "MODEL": "", "DATA": ""}, "run_hft.sh on node 0 of 2: dpo --lr 1"),
    ],
)
def test_a_method_with_a_recipe_starts_it_and_any_other_has_the_options_given_alone(
    job: Job, settings: dict[str, str], started: str
) -> None:
    assert job.run("--lr", "1", **settings) == 0
    assert f"0: {started}\n" in job.said()


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
        assert job.run(**settings) == 0
        words, environment = job.step()
        assert environment["SAVE"] == f"{job.folder}/{folder}"
        assert value_of("--output", words) == f"{job.folder}/{folder}/logs/%j-node-%n.log"


def test_one_variable_chooses_apptainer_or_pyxis_and_both_mount_the_working_folder_and_what_is_asked(job: Job) -> None:
    assert job.run(CONTAINER="/images/hft.sif", MOUNTS="/scratch,/a:/b", NCCL_SOCKET_IFNAME="ib0") == 0
    [first, second] = [call["words"] for call in job.calls("apptainer")]
    mounts = f"{job.folder}:{job.folder},/scratch,/a:/b"
    assert first == second
    assert first[:6] == ["exec", "--nv", "--bind", mounts, "--pwd", str(job.folder)]
    assert job.calls("apptainer")[0]["environment"]["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "1: finetune_llama_hft.sh on node 1 of 2: \n" in job.said()

    assert job.run(CONTAINER="registry#hft-megatron:gpu", MOUNTS="/scratch,/a:/b", STAND_IN_CODE="0") == 0
    pyxis, environment = job.step()
    assert value_of("--container-image", pyxis) == "registry#hft-megatron:gpu"
    assert value_of("--container-mounts", pyxis) == f"{job.folder}:{job.folder},/scratch:/scratch,/a:/b"
    assert value_of("--container-workdir", pyxis) == str(job.folder)
    assert pyxis[-1] == "/opt/hft_megatron/examples/finetune_llama_hft.sh"
    assert environment["PYTHONSAFEPATH"] == "1", "else the working folder's package would hide the image's"


def make(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_a_container_sees_all_that_the_options_name(job: Job, tmp_path: Path) -> None:
    machine = tmp_path / "machine"
    snapshot = machine / "hub" / "models--a" / "snapshots" / "c"
    make(snapshot / "config.json", machine / "hub" / "models--a" / "blobs" / "x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/x")
    make(machine / "data" / "a.jsonl", machine / "elsewhere" / "b.jsonl", machine / "valid" / "v.jsonl")
    (machine / "data" / "b.jsonl").symlink_to(machine / "elsewhere" / "b.jsonl")
    make(machine / "corpora" / "p.bin", machine / "corpora" / "p.idx", machine / "home" / "stage.jsonl")
    make(machine / "tokenizers" / "t" / "tokenizer.json", job.folder / "relative" / "d.jsonl")
    (machine / "linked").symlink_to("tokenizers")
    (machine / "runs").mkdir()
    (job.folder / "stages.yaml").write_text(
        f'- method: sft\n  train_data_path: ["{machine}/home/stage.jsonl", relative/d.jsonl]\n'
    )
    words = f"""--load-hf {snapshot} --train-data-path 0.3 {machine}/data/*.jsonl 0.7 relative/d.jsonl
        --valid-data-path={machine}/valid/v.jsonl --data-path {machine}/corpora/p --tokenizer-model {machine}/linked/t
        --save {machine}/runs/new/run --save-hf {machine}/runs/export --stages stages.yaml --hft-train *.q_proj,a/b
        --lr 1e-4 --prompt-separator /n"""
    assert job.run(*words.split(), CONTAINER="image", METHOD="pretrain", MODEL="", DATA="", STAND_IN_CODE="0") == 0
    seen = dict(mount.split(":")[::-1] for mount in value_of("--container-mounts", job.step()[0]).split(","))
    same = ["hub/models--a/snapshots/c", "hub/models--a/blobs", "data", "elsewhere", "valid/v.jsonl", "corpora", "runs"]
    same += ["tokenizers/t", "home/stage.jsonl"]
    expected = {f"{machine}/{path}": f"{machine}/{path}" for path in same}
    assert seen == {
        **expected,
        f"{machine}/linked/t": f"{machine}/tokenizers/t",
        str(job.folder): str(job.folder),
    }


def test_a_path_that_no_mount_can_have_is_a_mistake(job: Job, tmp_path: Path) -> None:
    make(tmp_path / "a:b" / "d.jsonl")
    assert job.run(CONTAINER="image", DATA=f"{tmp_path}/a:b/d.jsonl") == 2
    assert job.said().startswith(f"hft-megatron: error: {tmp_path}/a:b/d.jsonl has a comma or a colon in its name")
    assert job.calls("srun") == []


@pytest.mark.parametrize(("code", "requeued"), [("0", 0), ("1", 0), ("2", 0), ("3", 1)])
def test_only_a_run_that_stopped_with_a_checkpoint_goes_back_into_the_queue(job: Job, code: str, requeued: int) -> None:
    assert job.run(EXAMPLE_CODE=code) == int(code)
    asked = [call["words"] for call in job.calls("scontrol") if "requeue" in call["words"]]
    assert asked == [["requeue", "41234"]] * requeued


def test_of_an_array_only_the_stopped_task_goes_back(job: Job) -> None:
    job.run(STAND_IN_CODE="3", SLURM_JOB_ID="41200", SLURM_ARRAY_JOB_ID="41200", SLURM_ARRAY_TASK_ID="1")
    assert job.calls("scontrol")[-1]["words"] == ["requeue", "41200_1"]


def test_a_job_with_half_of_a_recipes_input_is_a_mistake_that_starts_nothing(job: Job) -> None:
    assert job.run(DATA="") == 2
    assert job.said() == (
        "hft-megatron: error: MODEL=/models/m and DATA=: give both in the environment of sbatch, or neither.\n"
    )
    assert job.calls("srun") == []


def test_the_header_is_one_that_sbatch_can_read() -> None:
    lines = BATCH_FILE.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1]), "sbatch stops at the first command"
    subprocess.run(["bash", "-n", str(BATCH_FILE)], check=True)
