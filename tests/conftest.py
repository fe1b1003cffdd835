"""Fixtures that every part's tests share, and the account of how long each tier took."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forked import await_server
from tests.support.ranks import RankPools

# Before torch is imported: its threads wait for each other by spinning, which takes minutes where ranks want the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# What runs keep for later ones; of a worker alone, and not the user's own.
_CACHE = tempfile.TemporaryDirectory(prefix="tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

REPOSITORY = Path(__file__).resolve().parents[1]
LONG_S = 10.0
"""A test that takes longer says why: ``pytest.mark.slow(reason="...")``, or ``long`` where the quick tests need it."""
_WITH_REASON = ("system", "slow", "long")
_HAS_REASON = ("has a reason", True)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(2).run(run_x, argument=...)`` runs ``run_x`` on two gloo ranks and returns their values."""
    await_server()
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


class Account:
    """Seconds of every tier, and the tests that are long without a reason."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._long: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        long_files = set()
        for item in items:
            if any("reason" in mark.kwargs for mark in item.iter_markers() if mark.name in _WITH_REASON):
                # With the test's report, which is all that leaves a worker.
                item.user_properties.append(_HAS_REASON)
                long_files.add(item.path)
        # Two workers take whole files in this order: a long one that came last would have a worker to itself.
        items.sort(key=lambda item: item.path not in long_files)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tier = next((name for name in ("system", "slow") if name in report.keywords), "quick")
        self._seconds[tier] = self._seconds.get(tier, 0.0) + report.duration
        has_reason = _HAS_REASON in map(tuple, report.user_properties)
        if report.when == "call" and report.duration > LONG_S and not has_reason:
            self._long.append(f"{report.nodeid} took {report.duration:.0f} s and gives no reason")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for tier, seconds in self._seconds.items():
            terminalreporter.write_line(f"{tier} tests, with their fixtures: {seconds:.0f} s")
        for line in self._long:
            terminalreporter.write_line(line)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` skips where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Account())
