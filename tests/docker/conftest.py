"""One Docker engine for all tests of images, and the images that they share."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.base_image import base_image, wheels_for_builds
from tests.support.engine import Engine
from tests.support.ranks import REPOSITORY
from tests.support.runs import make_inputs

CPU_IMAGE = "hft-megatron:cpu"
ITERATIONS = 24
WORDS = (
    f"--train-iters {ITERATIONS} --global-batch-size 8 --micro-batch-size 2 --seq-length 96 --log-interval 1".split()
)
PLANTED = (".env", "docker/.env", "wandb/settings", "runs/run.log", "hft_megatron/.netrc", "tools/wandb/debug.log")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def ingredients(engine: Engine) -> tuple[str, Path]:
    """A base image, and a folder with every wheel that a build may take."""
    with ThreadPoolExecutor() as pool:
        folder = pool.submit(wheels_for_builds, engine)
        return base_image(engine), folder.result()


@pytest.fixture(scope="session")
def wheels(ingredients: tuple[str, Path]) -> Path:
    return ingredients[1]


@pytest.fixture(scope="session")
def wandb_key() -> str:
    """A key that has the form of a real one, and must be nowhere but where the tests put it.

    Another one in every session: whatever would let it into a build makes that build another one, which is then not
    taken from what the engine has kept.
    """
    return secrets.token_hex(20)


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory, wandb_key: str) -> Path:
    """A copy of the repository with the key wherever people leave such things."""
    copy = tmp_path_factory.mktemp("context") / "repository"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", "__pycache__"))
    for name in PLANTED:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(f"WANDB_API_KEY={wandb_key}\n")
    return copy


@pytest.fixture(scope="session")
def run_outside(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Iterator["Future[Path]"]:
    """The example without a container, never disturbed: its folder, when it has ended."""
    save = tmp_path_factory.mktemp("outside") / "save"
    removed = ("RANK", "WORLD_SIZE", "PYTHON", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"MODEL": str(inputs / "model"), "DATA": str(inputs / "data.jsonl"), "SAVE": str(save)}
    environment |= {"PYTHON": sys.executable, "GPUS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(REPOSITORY / "examples" / "finetune_llama_hft.sh"), *WORDS]

    def run() -> Path:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        return save

    with ThreadPoolExecutor() as pool:
        yield pool.submit(run)


# A build keeps one core busy: the run outside takes the other.
@pytest.fixture(scope="session")
def image(engine: Engine, ingredients: tuple[str, Path], context: Path, run_outside: "Future[Path]") -> str:
    """docker/Dockerfile.cpu, built on a base made here."""
    base, wheels = ingredients
    engine.build(
        "--build-arg", f"BASE_IMAGE={base}", file="Dockerfile.cpu", tag=CPU_IMAGE, wheels=wheels, context=context
    )
    return CPU_IMAGE


@pytest.fixture(scope="session")
def outside(run_outside: "Future[Path]") -> Path:
    """The run folder of the example without a container."""
    return run_outside.result()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and data that the images' user may read."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    # Temporary folders and safetensors files are their owner's alone.
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
