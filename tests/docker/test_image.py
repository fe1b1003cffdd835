"""The images, built by a real engine and run as docs/clusters.md says, on a file system that can only be read."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

import hft_megatron
from tests.docker.conftest import ITERATIONS, WORDS
from tests.support.engine import Engine
from tests.support.leaks import files_with
from tests.support.runs import losses_in, read_metrics

pytestmark = pytest.mark.system(reason="images are built, and train")

USER = 10001
HARDENED = (
    "--network",
    "none",
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
)
LIMITS = ("--memory", "3g", "--pids-limit", "256", "--shm-size", "1g")
COMPILERS = "cc c++ gcc g++ clang ld as make cmake nvcc rustc go"


def folder_for_user(path: Path) -> Path:
    path.mkdir()
    os.chown(path, USER, USER)
    return path


def words_for_run(inputs: Path, save: Path) -> list[str]:
    """What a hardened run of the example needs: mounts, and where they are inside."""
    settings = {"MODEL": "/inputs/model", "DATA": "/inputs/data.jsonl", "SAVE": "/save", "GPUS_PER_NODE": "2"}
    words = [*HARDENED, *LIMITS, "--volume", f"{inputs}:/inputs:ro", "--volume", f"{save}:/save"]
    return [*words, *(word for name, value in settings.items() for word in ("--env", f"{name}={value}"))]


def exported(save: Path) -> str:
    return hashlib.sha256((save / f"hf_iter_{ITERATIONS}" / "model.safetensors").read_bytes()).hexdigest()


def said(engine: Engine, name: str) -> str:
    logs = engine.docker("logs", name)
    return f"{logs.stdout[-3000:]}\n{logs.stderr[-3000:]}"


def wait_for_lines(engine: Engine, name: str, save: Path, count: int, seconds: float = 600) -> None:
    """Until a container has written so many lines to its run's log."""
    log, deadline = save / "metrics.jsonl", time.monotonic() + seconds
    while not log.exists() or len(read_metrics(save)) < count:
        running = engine.docker("inspect", "--format", "{{.State.Running}}", name).stdout.strip()
        assert running == "true", said(engine, name)
        assert time.monotonic() < deadline, said(engine, name)


def test_the_image_has_labels_no_compiler_and_nothing_of_root_in_it(engine: Engine, image: str) -> None:
    config = json.loads(engine.docker("inspect", image).stdout)[0]["Config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Labels"]["org.opencontainers.image.version"] == hft_megatron.__version__
    assert config["Healthcheck"]["Test"][0] == "CMD"
    asked = engine.docker(
        "run", "--rm", "--network", "none", image, "bash", "-c", f"id -u; command -v {COMPILERS}", check=False
    )
    assert asked.stdout.split() == [str(USER)]


def test_options_commands_and_torchrun_all_start_and_a_mistake_ends_with_2(engine: Engine, image: str) -> None:
    run = ("run", "--rm", *HARDENED, image)
    assert "usage: hft-megatron sft" in engine.docker(*run, "--help").stdout
    assert "usage: hft-megatron plan" in engine.docker(*run, "hft-megatron", "plan", "--help").stdout
    assert "--nproc-per-node" in engine.docker(*run, "torchrun", "--help").stdout
    mistaken = engine.docker("run", "--rm", *HARDENED, "--env", "MODEL=/nowhere", image, check=False)
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith("hft-megatron: error: MODEL=/nowhere is given without DATA")
    unreadable = engine.docker(
        "run", "--rm", "--env", "WANDB_API_KEY_FILE=/no/key", "--network", "none", image, check=False
    )
    assert unreadable.returncode == 2
    assert "WANDB_API_KEY_FILE=/no/key" in unreadable.stderr


def test_orphans_are_reaped(engine: Engine, image: str) -> None:
    script = (
        "(sleep 0.2 & exec true); sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l; head -c 4 /proc/1/cmdline"
    )
    said = engine.docker("run", "--rm", *HARDENED, image, "bash", "-c", script).stdout.split()
    assert said == ["0", "tini"]


def test_a_run_on_a_read_only_system_has_the_losses_of_one_outside_and_keeps_the_key_to_itself(
    engine: Engine, image: str, inputs: Path, outside: Path, tmp_path: Path, wandb_key: str
) -> None:
    save = folder_for_user(tmp_path / "save")
    secret = tmp_path / "key"
    secret.write_text(wandb_key)
    os.chown(secret, USER, USER)
    secret.chmod(0o400)
    words = [*words_for_run(inputs, save), "--volume", f"{secret}:/run/secrets/wandb:ro", "--health-interval", "5s"]
    words += ["--env", "WANDB_API_KEY_FILE=/run/secrets/wandb", "--env", "WANDB_MODE=offline"]
    engine.docker("run", "--detach", "--name", "whole", *words, image, *WORDS, "--wandb-project", "tests")

    wait_for_lines(engine, "whole", save, 1)
    users = engine.docker("top", "whole", "-eo", "uid,pid,args").stdout.splitlines()[1:]
    # The engine's own, for a moment at every look at the run's health.
    users = [line for line in users if not line.endswith("runc init")]
    assert len(users) >= 4
    assert {line.split()[0] for line in users} == {str(USER)}
    state = json.loads(engine.docker("inspect", "whole").stdout)[0]["State"]
    assert state["Health"]["Status"] == "healthy", state
    assert engine.docker("wait", "whole").stdout.strip() == "0", said(engine, "whole")
    assert losses_in(save) == losses_in(outside)
    assert exported(save) == exported(outside)

    assert list(save.glob("wandb/offline-run-*")), "wandb was not used"
    in_a_layer = "below tini: nothing or options are for the example script"
    found = files_with([wandb_key, in_a_layer], [engine.data, save])
    assert found[in_a_layer], "the search does not see what is in layers"
    assert found[wandb_key] == []
    assert wandb_key not in engine.docker("inspect", "whole", image).stdout + engine.docker("history", image).stdout


def test_stop_saves_and_ends_with_3_and_a_second_run_comes_to_the_same_bits(
    engine: Engine, image: str, inputs: Path, outside: Path, tmp_path: Path
) -> None:
    save = folder_for_user(tmp_path / "save")
    words = words_for_run(inputs, save)
    engine.docker("run", "--detach", "--name", "stopped", *words, image, *WORDS)
    wait_for_lines(engine, "stopped", save, 3)
    engine.docker("stop", "--time", "60", "stopped")
    assert engine.docker("wait", "stopped").stdout.strip() == "3", said(engine, "stopped")
    stopped_at = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped_at < ITERATIONS
    assert f"SIGTERM stopped the run at iteration {stopped_at}" in said(engine, "stopped")

    engine.docker("run", "--rm", *words, image, *WORDS)
    assert losses_in(save) == losses_in(outside)
    assert exported(save) == exported(outside)


def test_a_run_that_writes_no_line_is_unhealthy(engine: Engine, image: str) -> None:
    words = (
        "--env",
        "SAVE=/tmp/run",
        "--env",
        "HFT_HEALTH_SECONDS=1",
        "--health-interval",
        "1s",
        "--health-retries",
        "1",
    )
    engine.docker("run", "--detach", "--name", "silent", *words, "--health-start-period", "1s", image, "sleep", "60")

    deadline = time.monotonic() + 120
    while engine.docker("inspect", "--format", "{{.State.Health.Status}}", "silent").stdout.strip() != "unhealthy":
        assert time.monotonic() < deadline, engine.docker("inspect", "silent").stdout
    engine.docker("rm", "--force", "silent")


def test_every_instruction_of_the_gpu_image_runs_on_a_base_with_the_cpu_build_of_torch(
    engine: Engine, image: str, wheels: Path, context: Path
) -> None:
    torch = ("python3", "-c", "import torch; print(torch.__version__)")
    arguments = ("--build-arg", f"BASE_IMAGE={image}", "--build-arg")
    engine.build(
        *arguments, "BASE_BRINGS=torch", file="Dockerfile", tag="hft-megatron:gpu", wheels=wheels, context=context
    )
    run = ("run", "--rm", *HARDENED)
    assert engine.docker(*run, "hft-megatron:gpu", *torch).stdout == engine.docker(*run, image, *torch).stdout
    assert "usage: hft-megatron sft" in engine.docker(*run, "hft-megatron:gpu", "--help").stdout
    with pytest.raises(AssertionError, match="BASE_IMAGE has no transformer_engine, which BASE_BRINGS names"):
        engine.build(*arguments, "VERSION=0", file="Dockerfile", tag="refused", wheels=wheels, context=context)
