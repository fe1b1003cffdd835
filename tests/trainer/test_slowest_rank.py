"""A rank that is slow by itself is named, and not those that wait for it."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.model.layers import LlamaMLP
from hft_megatron.trainer.hooks import in_words
from tests.support.runs import Recorder, make_inputs, read_metrics, run_recorded, words_for

SLEEP_S = 0.03
"""In every feed-forward block: far above what a block of the toy takes."""
WAITING = "forward time (ms)"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("slowest"))


def run_with_a_slow_rank(words: list[str], slow: int) -> None:
    recorder = Recorder(kill_at=None, kill_rank=0)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.run.placement.rank == slow:
            time.sleep(SLEEP_S)
        return original(self, *args, **kwargs)

    original = LlamaMLP.forward
    with patch.object(LlamaMLP, "forward", forward):
        run_recorded("sft", words, recorder)


@pytest.mark.parametrize(
    ("layout", "slow"),
    [
        ("", 1),
        pytest.param("--tensor-model-parallel-size 2", 0, marks=pytest.mark.engine),
        ("--pipeline-model-parallel-size 2", 0),
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_a_slow_rank_is_in_the_record_with_its_host_and_its_share_of_the_median(ranks, inputs, tmp_path, layout, slow):
    options = ["--train-iters", 4, "--log-interval", 2, "--save", tmp_path, "--global-batch-size", 2]
    ranks(2).run(run_with_a_slow_rank, words=words_for(inputs, *options, *layout.split()), slow=slow)
    [_, record] = read_metrics(tmp_path)
    slept = SLEEP_S * 1e3 * (2 if "pipeline" in layout else 4) * (1 if layout == "" else 2)
    worst, middle = record["compute time, slowest rank (ms)"], record["compute time, median rank (ms)"]
    assert record["slowest rank"].startswith(f"rank {slow} on ")
    assert record["slowest rank"].endswith(f"{worst / middle:.2f} x the median compute time")
    # The median of two is between them: the other rank's own time is none of the sleep.
    assert worst > slept
    assert 2 * middle - worst < worst - 0.8 * slept
    if "tensor" in layout:
        assert record[WAITING] > slept, "the last rank waits, and its forward pass is as long as ever"


def test_a_rank_is_named_from_a_threshold_on() -> None:
    places = ["rank 0 on a", "rank 1 on b", "rank 2 on b"]
    assert "slowest rank" not in in_words([10.0, 12.9, 10.0], places)
    assert in_words([10.0, 13.0, 10.0], places) == {
        "compute time, median rank (ms)": 10.0,
        "compute time, slowest rank (ms)": 13.0,
        "slowest rank": "rank 1 on b, 1.30 x the median compute time",
    }
