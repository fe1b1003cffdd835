"""What several tests of runs share."""

from pathlib import Path

import pytest

from tests.support.preferences import make_pairs


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and preference pairs; nothing is written into it but a cache of log-probabilities."""
    return make_pairs(tmp_path_factory.mktemp("pairs"), hidden_size=32, intermediate_size=56)
