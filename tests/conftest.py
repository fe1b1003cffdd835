"""Fixtures that every part's tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import RankPools

# Before torch is imported: its threads wait for each other by spinning, which takes minutes where ranks want the cores.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(2).run(run_x, argument=...)`` runs ``run_x`` on two gloo ranks and returns their values."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real test data: HFT_TEST_DATA, or ../shared/data beside the repository; the test skips without it."""
    folder = Path(os.environ.get("HFT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is not a folder; set HFT_TEST_DATA")
    return folder
