"""One Docker engine for all tests of images, and the images that they share."""

import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.base_image import PYTHON_BASE, import_base, wheels_for_builds
from tests.support.engine import Engine
from tests.support.ranks import REPOSITORY
from tests.support.runs import make_inputs

CPU_IMAGE = "hft-megatron:cpu"
PLANTED = (".env", "docker/.env", "wandb/settings", "runs/run.log", "hft_megatron/.netrc", "tools/wandb/debug.log")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def wheels(engine: Engine) -> Path:
    """A folder with every wheel that a build may take; the base image is there as well."""
    with ThreadPoolExecutor() as pool:
        folder = pool.submit(wheels_for_builds, engine.folder / "wheels")
        import_base(engine)
        return folder.result()


@pytest.fixture(scope="session")
def wandb_key() -> str:
    """A key that has the form of a real one, and must be nowhere but where the tests put it."""
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
def image(engine: Engine, wheels: Path, context: Path) -> str:
    """docker/Dockerfile.cpu, built on a base made here."""
    engine.build(
        "--build-arg", f"BASE_IMAGE={PYTHON_BASE}", file="Dockerfile.cpu", tag=CPU_IMAGE, wheels=wheels, context=context
    )
    return CPU_IMAGE


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and data that the images' user may read."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    # Temporary folders and safetensors files are their owner's alone.
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
