"""What can be said of the Docker files without an engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hft_megatron
from tests.support.ranks import REPOSITORY

FOLDER = REPOSITORY / "docker"
FILES = ("Dockerfile", "Dockerfile.cpu")


def text_of(name: str) -> str:
    return (FOLDER / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing_at_the_level_of_warnings(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint; it is in '.[dev]'")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "warning", str(FOLDER / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_the_base_is_an_argument_with_a_pinned_default_that_the_manual_names(name: str) -> None:
    (default,) = re.findall(r"^ARG BASE_IMAGE=(.+)$", text_of(name), re.MULTILINE)
    assert re.fullmatch(r"[^:@\s]+:\d+\.\d+[^\s]*", default), f"{default} is not one version"
    assert default in text_of("README.md")
    assert set(re.findall(r"^FROM (\S+)", text_of(name), re.MULTILINE)) == {"${BASE_IMAGE}"}


@pytest.mark.parametrize("name", FILES)
def test_the_user_is_a_number_and_the_version_is_the_package_s(name: str) -> None:
    assert re.findall(r"^USER (.+)$", text_of(name), re.MULTILINE)[-1] == "10001:10001"
    assert re.findall(r"^ARG VERSION=(.+)$", text_of(name), re.MULTILINE) == [hft_megatron.__version__]
    assert "WANDB" not in text_of(name)


def test_compose_gives_the_ranks_their_time_to_save_and_30_s_more() -> None:
    for service in yaml.safe_load(text_of("compose.yaml"))["services"].values():
        shutdown = int(service["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert service["stop_grace_period"] == f"{shutdown + 30}s"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
