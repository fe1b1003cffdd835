"""What the shell half of the examples decides, with a stand-in for Python that notes what it is asked to run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.cli.entry import commands
from hft_megatron.cli.training_command import TrainingOptions
from hft_megatron.config.loading import load_options
from hft_megatron.config.optimizer import schedule_fits_the_run
from hft_megatron.config.training import length_is_given_once
from tests.support.ranks import REPOSITORY
from tests.support.shapes import tiny_shape

SCRIPT = REPOSITORY / "examples" / "finetune_llama_hft.sh"
DPO_SCRIPT = SCRIPT.with_name("dpo_llama_hft.sh")
TRACE_SCRIPT = SCRIPT.with_name("trace_llama_hft.sh")
ANY_COMMAND = SCRIPT.with_name("run_hft.sh")

STAND_IN = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open(os.environ["STAND_IN_LOG"], "a") as log:
    log.write(json.dumps({{"words": words, "environment": dict(os.environ)}}) + "\\n")
if words[0] == "-c":
    os.execv("{python}", ["{python}", *words])
if "--check" in words:
    import time
    sys.exit(int(eval(os.environ.get("STAND_IN_CHECK", "0"))))
if "hft_megatron.parallel.start_ranks" in words:
    exec(os.environ.get("STAND_IN_TORCHRUN", ""))
"""

WRITE_STATUS = """
with open(os.path.join(words[words.index("--save") + 1], "status.json"), "w") as status:
    json.dump({{"exit_code": {written}, "state": "", "message": "said by the run"}}, status)
sys.exit({ranks})
"""

WAIT_FOR_SIGNAL = """
import signal, time
received = []
def receive(number, frame):
    received.append(signal.Signals(number).name)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, receive)
save = words[words.index("--save") + 1]
open(os.path.join(save, "ready"), "w").close()
while not received:
    time.sleep(0.01)
time.sleep(0.3)  # a second signal would come now
with open(os.path.join(save, "status.json"), "w") as status:
    json.dump({"exit_code": 3, "state": "stopped", "message": ""}, status)
print("the ranks got", *received, file=sys.stderr)
sys.exit(3)
"""


@dataclass
class Script:
    """An example script with a stand-in for Python, in a folder where nothing is."""

    folder: Path
    path: Path = SCRIPT

    @property
    def save(self) -> Path:
        return self.folder / "save"

    def environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        stand_in = self.folder / "python"
        stand_in.write_text(STAND_IN.format(python=sys.executable))
        stand_in.chmod(0o755)
        given = {"MODEL": "m", "DATA": "d", "SAVE": str(self.save), "GPUS_PER_NODE": "2"}
        given |= {"PYTHON": str(stand_in), "STAND_IN_LOG": str(self.folder / "log"), "PATH": os.environ["PATH"]}
        return {name: value for name, value in {**given, **settings}.items() if value != ""}

    def run(self, *words: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        """Run the script under bash; a setting of "" is left out of the environment."""
        command = ["bash", str(self.path), *words]
        environment = self.environment(settings)
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[dict[str, Any]]:
        """What Python was asked to run, in order, without questions about the environment."""
        log = self.folder / "log"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call for call in calls if call["words"][0] != "-c"]

    def started(self) -> dict[str, Any]:
        """The call that starts the ranks: the last one."""
        call = self.calls()[-1]
        assert call["words"][:2] == ["-m", "hft_megatron.parallel.start_ranks"]
        return call


def value_of(option: str, call: dict[str, Any]) -> str:
    """The value that counts: the last one."""
    words: list[str] = call["words"]
    return words[len(words) - words[::-1].index(option)]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(folder=tmp_path)


@pytest.mark.parametrize("path", [SCRIPT, DPO_SCRIPT, TRACE_SCRIPT], ids=lambda path: path.name)
def test_the_file_is_valid_in_both_languages_and_executable(path: Path) -> None:
    compile(path.read_text(), str(path), "exec")
    assert "\\" not in path.read_text(), "Python would take it for an escape in the string that holds the shell half"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


def test_the_preference_script_starts_a_preference_tuning(tmp_path: Path) -> None:
    script = Script(folder=tmp_path, path=DPO_SCRIPT)
    assert script.run("--dpo-reference", "shared", "--train-epochs", "3").returncode == 0
    check, start = script.calls()
    assert check["words"][:4] == ["-m", "hft_megatron", "dpo", "--check"]
    assert start["words"][-len(check["words"]) + 4 :] == check["words"][4:]
    assert value_of("--dpo-reference", start) == "shared"
    assert "--train-iters" not in start["words"]


def test_the_trace_script_starts_a_sequence_whose_length_batch_and_rate_are_the_commands(tmp_path: Path) -> None:
    script = Script(folder=tmp_path, path=TRACE_SCRIPT)
    assert script.run("--replay-ratio", "0.1").returncode == 0
    check, start = script.calls()
    assert check["words"][:4] == ["-m", "hft_megatron", "continual", "--check"]
    assert start["words"][-len(check["words"]) + 4 :] == check["words"][4:]
    assert (value_of("--continual-tasks", start), value_of("--replay-ratio", start)) == ("d", "0.1")
    assert not {"--train-epochs", "--train-iters", "--global-batch-size", "--lr"} & set(start["words"])
    assert value_of("--save-hf", start) == f"{script.save}/hf"
    (script.save / "hf").mkdir()
    assert script.run().returncode == 0
    assert "--save-hf" not in script.started()["words"]


@pytest.mark.parametrize(("missing", "sentence"), [("MODEL", "MODEL is not set"), ("DATA", "DATA is not set")])
def test_the_trace_script_has_no_demo(tmp_path: Path, missing: str, sentence: str) -> None:
    script = Script(folder=tmp_path, path=TRACE_SCRIPT)
    result = script.run(**{missing: ""})
    assert (result.returncode, script.calls()) == (2, [])
    assert sentence in result.stderr


def test_any_command_is_started_with_the_options_given_and_no_others(tmp_path: Path) -> None:
    script = Script(folder=tmp_path, path=ANY_COMMAND)
    assert script.run("pretrain", "--data-path", "p", TP="4").returncode == 0
    check, start = script.calls()
    save = str(script.save)
    words = ["-m", "hft_megatron", "pretrain", "--save", save, "--load", save, "--data-path", "p"]
    assert check["words"] == [*words[:3], "--check", *words[3:]]
    assert start["words"][-len(words) :] == words

    (tmp_path / "run.yaml").write_text(f"save: {tmp_path}/written\ntrain_iters: 3\n")
    for options in (["--config", "run.yaml"], ["--save", f"{tmp_path}/written"]):
        assert script.run("sft", *options).returncode == 0
        assert script.started()["words"][-len(options) - 3 :] == ["-m", "hft_megatron", "sft", *options]
        assert (tmp_path / "written").is_dir()


@pytest.mark.parametrize("words", [(), ("--lr", "1")])
def test_without_a_command_there_is_nothing_to_start(tmp_path: Path, words: tuple[str, ...]) -> None:
    script = Script(folder=tmp_path, path=ANY_COMMAND)
    result = script.run(*words)
    assert result.returncode == 2
    assert result.stderr.startswith("hft-megatron: error: the command is missing; write bash ")
    assert script.calls() == []


def test_the_check_comes_first_and_for_all_ranks(script: Script) -> None:
    assert script.run(NNODES="2", GPUS_PER_NODE="4", MASTER_ADDR="node-a").returncode == 0
    check, start = script.calls()
    assert check["words"][:4] == ["-m", "hft_megatron", "sft", "--check"]
    assert check["environment"]["WORLD_SIZE"] == "8"
    assert start["words"][-len(check["words"]) + 4 :] == check["words"][4:]


def test_only_a_check_starts_nothing(script: Script) -> None:
    assert script.run("--check").returncode == 0
    assert len(script.calls()) == 1
    assert not script.save.exists()


def test_a_failing_check_starts_nothing_and_leaves_no_folder(script: Script) -> None:
    assert script.run(STAND_IN_CHECK="2").returncode == 2
    assert len(script.calls()) == 1
    assert not script.save.exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"DATA": ""}, "MODEL=m is given without DATA"),
        ({"MODEL": ""}, "DATA=d is given without MODEL"),
        ({"NNODES": "2", "SAVE": ""}, "SAVE is not set on 2 nodes"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set on 2 nodes"),
        ({"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE=two must be a whole number above 0"),
        ({"NNODES": "0"}, "NNODES=0 must be a whole number above 0"),
        ({"NODE_RANK": "first"}, "NODE_RANK=first must be a whole number"),
        ({"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python does not run a Python that has torch"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(script: Script, settings: dict[str, str], sentence: str) -> None:
    result = script.run(**settings)
    assert result.returncode == 2
    assert result.stderr.startswith(f"hft-megatron: error: {sentence}")
    assert result.stderr.count("\n") == 1
    assert not any("hft_megatron.parallel.start_ranks" in call["words"] for call in script.calls())


@pytest.mark.parametrize("path", [SCRIPT, DPO_SCRIPT, TRACE_SCRIPT], ids=lambda path: path.name)
def test_a_file_of_options_is_not_overridden_by_a_recipe(path: Path, tmp_path: Path) -> None:
    script = Script(folder=tmp_path, path=path)
    for words in (("--config", "run.yaml"), ("--config=run.yaml",)):
        result = script.run(*words)
        assert result.returncode == 2
        assert "run.yaml: the options of this script would override the file's; start it with bash exa" in result.stderr
        assert not script.calls()


def test_options_after_the_name_override_and_the_save_folder_is_also_the_one_to_load(script: Script) -> None:
    other = script.folder / "other"
    assert script.run("--lr", "1e-3", "--train_iters=7", "--save", str(other)).returncode == 0
    call = script.started()
    assert value_of("--lr", call) == "1e-3"
    assert value_of("--save", call) == value_of("--load", call) == str(other)
    assert value_of("--save-hf", call) == f"{other}/hf_iter_7"
    assert not script.save.exists()


@pytest.mark.parametrize("path", [SCRIPT, DPO_SCRIPT], ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("given", "replaced", "export"),
    [
        (["--train_epochs=2"], {"--train-iters"}, "hf_epoch_2"),
        (["--train-samples", "6400"], {"--train-iters"}, "hf_sample_6400"),
        (["--lr_warmup_iters=5"], {"--lr-warmup-fraction"}, "hf_iter_1000"),
        (
            ["--train-samples=6400", "--lr-warmup-samples=640"],
            {"--train-iters", "--lr-warmup-fraction"},
            "hf_sample_6400",
        ),
    ],
)
def test_a_length_or_a_warm_up_in_another_unit_takes_the_place_of_the_scripts(
    tmp_path: Path, path: Path, given: list[str], replaced: set[str], export: str
) -> None:
    script = Script(folder=tmp_path, path=path)
    assert script.run().returncode == 0
    usual = script.started()
    assert {"--train-iters", "--lr-warmup-fraction"} < set(usual["words"])
    assert value_of("--save-hf", usual) == f"{script.save}/hf_iter_1000"
    assert script.run(*given).returncode == 0
    call = script.started()
    assert {word for word in usual["words"] if word.startswith("--") and word not in call["words"]} == replaced
    assert value_of("--save-hf", call) == f"{script.save}/{export}"
    _, _, method, *words = call["words"][call["words"].index("-m", 1) :]
    options = load_options(commands()[method].options, words)
    assert isinstance(options, TrainingOptions)
    for rule in (length_is_given_once, schedule_fits_the_run):
        rule(options.as_run, tiny_shape(2), 2)


def test_sizes_come_from_the_environment_and_tensor_parallel_from_the_number_of_ranks(script: Script) -> None:
    for ranks, expected in (("1", "1"), ("2", "2"), ("8", "2")):
        script.run(GPUS_PER_NODE=ranks)
        assert value_of("--tensor-model-parallel-size", script.started()) == expected
    script.run(GPUS_PER_NODE="8", TP="4", PP="2")
    assert value_of("--tensor-model-parallel-size", script.started()) == "4"
    assert value_of("--pipeline-model-parallel-size", script.started()) == "2"


def test_a_node_is_started_with_its_place_and_leaves_the_status_to_node_0(script: Script) -> None:
    script.save.mkdir()
    (script.save / "status.json").write_text(json.dumps({"exit_code": 3, "message": ""}))
    result = script.run(
        NNODES="2", NODE_RANK="1", MASTER_ADDR="node-a", MASTER_PORT="1234", STAND_IN_TORCHRUN="sys.exit(1)"
    )
    call = script.started()
    place = {"--nnodes": "2", "--node-rank": "1", "--master-addr": "node-a", "--master-port": "1234"}
    assert {option: value_of(option, call) for option in place} == place
    assert result.returncode == 1
    assert (script.save / "status.json").exists()


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 600), ("2", 120), ("0.25", 15), ("0.001", 1)])
def test_torchrun_waits_for_the_nodes_as_long_as_the_ranks_for_each_other(
    script: Script, minutes: str | None, seconds: int
) -> None:
    words = () if minutes is None else ("--distributed-timeout-minutes", minutes)
    assert script.run(*words, NNODES="2", MASTER_ADDR="node-a").returncode == 0
    assert value_of("--rdzv-conf", script.started()) == f"timeout={seconds}"


def test_ranks_meet_at_a_port_that_is_held_unless_they_may_be_restarted(script: Script) -> None:
    # A port that torchrun only looks up may be taken by the time that rank 0 listens.
    shares = []
    for settings in ({}, {"MAX_RESTARTS": "2"}, {"NNODES": "2", "MASTER_ADDR": "node-a"}):
        assert script.run(**settings).returncode == 0
        shares.append("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in script.started()["environment"])
    assert shares == [True, False, False]


def test_a_restart_keeps_the_export_of_the_same_iterations(script: Script) -> None:
    (script.save / "hf_iter_5").mkdir(parents=True)
    script.run("--train-iters", "5")
    assert "--save-hf" not in script.started()["words"]
    script.run("--train-iters", "5", "--save-hf-interval", "2")
    assert value_of("--save-hf", script.started()) == f"{script.save}/hf_iter_5"
    script.run("--train-iters", "6")
    assert value_of("--save-hf", script.started()) == f"{script.save}/hf_iter_6"


@pytest.mark.parametrize(
    ("ranks", "written", "code", "says_it_again"),
    [
        *((code, code, code, False) for code in (0, 1, 2, 3)),
        (130, 1, 130, False),
        (1, 0, 1, False),
        (0, 3, 0, False),
        (1, 2, 2, True),
        (1, 3, 3, True),
        (143, 3, 3, True),
    ],
)
def test_the_exit_code_is_the_ranks_and_that_of_the_status_file_where_they_only_know_of_a_failure(
    script: Script, ranks: int, written: int, code: int, says_it_again: bool
) -> None:
    result = script.run(STAND_IN_TORCHRUN=WRITE_STATUS.format(ranks=ranks, written=written))
    assert result.returncode == code
    assert result.stderr == ("hft-megatron: said by the run\n" if says_it_again else "")


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 3), ("SIGUSR1", 3), ("SIGHUP", 3), ("SIGINT", 130)])
def test_a_signal_while_options_are_checked_ends_the_check_and_the_script_with_one_sentence(
    script: Script, sent: str, code: int
) -> None:
    save = script.folder / "save"
    environment = script.environment({"STAND_IN_CHECK": f"os.mkdir({str(save)!r}) or time.sleep(60)"})
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_all_signals,
    )
    deadline = time.monotonic() + 60
    while not save.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, sent))
    _, errors = process.communicate(timeout=10)
    assert process.returncode == code
    name = {"SIGHUP": "SIGTERM"}.get(sent, sent)
    assert errors == (
        f"hft-megatron: {name} stopped the run before training began; run it again with SAVE={script.save}\n"
    )


def test_an_old_status_says_nothing_about_this_run(script: Script) -> None:
    script.save.mkdir()
    (script.save / "status.json").write_text(json.dumps({"exit_code": 3, "message": "old"}))
    result = script.run(STAND_IN_TORCHRUN="sys.exit(1)")
    assert result.returncode == 1
    assert "old" not in result.stderr


def hear_all_signals() -> None:
    """In the child: bash cannot trap what its parent ignored, as nohup and shells without job control do."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_a_signal_reaches_the_ranks_once_even_from_a_terminal(script: Script, sent: str, received: str) -> None:
    environment = script.environment({"STAND_IN_TORCHRUN": WAIT_FOR_SIGNAL})
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_all_signals,
    )
    deadline = time.monotonic() + 60
    while not (script.save / "ready").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    # A terminal signals the whole foreground group; a scheduler mostly the first process.
    os.killpg(process.pid, getattr(signal, sent))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors == f"the ranks got {received}\n"
