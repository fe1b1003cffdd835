"""--async-save writes a snapshot while training continues; failures end all ranks. Run: pytest tests/checkpoint"""

import errno
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.checkpoint.folders import find_checkpoints
from tests.support.checkpoints import largest_differences
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

TP2 = ["--tensor-model-parallel-size", "2"]
SLOW_WRITER_S = 0.5


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("background"))


def run_with_a_slow_writer(
    words: list[str], kill_at: int | None = None, seconds: float = SLOW_WRITER_S
) -> dict[str, Any]:
    """Every writer sleeps before it writes, so that steps are taken meanwhile."""
    from hft_megatron.checkpoint import writing

    original = writing._write

    def slow(*arguments: Any) -> None:
        time.sleep(seconds)
        original(*arguments)

    with patch.object(writing, "_write", slow):
        return run_sft_words(words, kill_at=kill_at)


@pytest.mark.slow(reason="writers are slowed down until two steps fit behind them")
@pytest.mark.parametrize("options", [TP2, ["--overlap-grad-reduce", "--overlap-param-gather"]], ids=["tp2", "dp2"])
def test_a_checkpoint_written_in_the_background_is_the_one_of_its_step(
    options: list[str], ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, *options, "--save-interval", 2, "--hft-round-interval", 3)
    whole = ranks(2).run(run_sft_words, words=[*words, "--save", str(tmp_path / "now")])
    background = [*words, "--async-save", "--save", str(tmp_path / "later")]
    later = ranks(2).run(run_with_a_slow_writer, words=background)
    for rank in range(2):
        assert later[rank]["steps"] == whole[rank]["steps"]
        assert later[rank]["state"] == whole[rank]["state"]
    assert [path.name for path in find_checkpoints(str(tmp_path / "later")).complete] == [
        f"iter_000000{iteration}" for iteration in (6, 4, 2)
    ]
    for iteration in (2, 4, 6):
        one, other = (str(tmp_path / name / f"iter_000000{iteration}") for name in ("now", "later"))
        [differences] = ranks(1).run(largest_differences, one=one, other=other)
        assert set(differences.values()) == {0.0}


@pytest.mark.slow
def test_the_log_says_for_how_long_training_stood_still(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    """The steps up to the next save take longer than the writer, which takes much longer than all else of a save."""
    words = words_for(inputs, "--save", tmp_path, "--save-interval", 60, "--async-save", "--train-iters", 120)
    [answer] = ranks(1).run(run_with_a_slow_writer, words=words, seconds=1.0)
    [first, _] = [line for line in answer["said"] if "successfully saved checkpoint" in line]
    total, stall = (float(number.replace(",", "")) for number in re.findall(r"([0-9,]+) ms", first))
    assert total > 1000.0 > stall > 0


@pytest.mark.slow
def test_a_stop_waits_until_the_checkpoint_is_complete(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--save", tmp_path, "--load", tmp_path, "--save-interval", 2, "--async-save")
    [whole] = ranks(1).run(run_sft_words, words=words_for(inputs))
    [first] = ranks(1).run(run_with_a_slow_writer, words=words, kill_at=3)
    assert find_checkpoints(str(tmp_path)).newest == tmp_path / "iter_0000003"
    [second] = ranks(1).run(run_sft_words, words=words)
    assert first["steps"] + second["steps"] == whole["steps"]
    assert second["state"] == whole["state"]


def run_on_a_full_disk(words: list[str], guilty: int) -> dict[str, Any]:
    """The failure of a run in which the second save of one rank finds its disk full, and how long it took to say so."""
    from hft_megatron.checkpoint import writer, writing
    from hft_megatron.errors import RunFailed

    rank, calls = int(os.environ["RANK"]), 0
    original = writing.request_save

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        request, report = original(*arguments)
        if calls == 2 and rank == guilty:
            request = request._replace(async_fn=full)
        return request, report

    def full(rank: int, buckets: Any, report: writing.WriterReport) -> None:
        report.put(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), {})

    with patch.object(writer, "request_save", counted), pytest.raises(RunFailed) as caught:
        run_sft_words(words)
    return {"said": str(caught.value)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["foreground", "background"])
@pytest.mark.parametrize("guilty", [0, 1])
def test_what_one_rank_cannot_write_is_one_sentence_on_all(
    guilty: int, how: str, ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    asked = ["--async-save"] if how == "background" else []
    words = words_for(inputs, *TP2, *asked, "--save", tmp_path, "--save-interval", 2)
    first, second = ranks(2).run(run_on_a_full_disk, words=words, guilty=guilty)
    assert first == second
    assert f"the checkpoint of iteration 4 cannot be written to {tmp_path}: rank {guilty}: " in first["said"]
    assert "No space left on device" in first["said"]
    assert first["said"].endswith(f"the newest complete checkpoint is {tmp_path / 'iter_0000002'}.")
    assert find_checkpoints(str(tmp_path)).newest == tmp_path / "iter_0000002"


@pytest.mark.slow
def test_only_the_checkpoints_asked_for_are_kept(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--save", tmp_path, "--save-interval", 1, "--keep-last", 2, "--save-retain-interval", 3)
    [answer] = ranks(1).run(run_sft_words, words=words)
    assert [path.name[-1] for path in find_checkpoints(str(tmp_path)).complete] == ["6", "5", "3"]
    assert [line for line in answer["said"] if "deleted" in line] == [
        f"  deleted {tmp_path / f'iter_000000{iteration}'}" for iteration in (1, 2, 4)
    ]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(
        inputs, "--save", tmp_path, "--load", tmp_path, "--save-interval", 1, "--lr-decay-style", "constant"
    )
    ranks(2).run(run_sft_words, words=[*words, "--train-iters", "3"])
    (tmp_path / "iter_0000002" / "train_state.json").write_text("{")
    answers = ranks(2).run(run_sft_words, words=[*words, "--train-iters", "4", "--keep-last", "3"])
    assert [line for line in answers[0]["said"] if line.startswith("> older checkpoints could not be deleted: ")]
    assert len(find_checkpoints(str(tmp_path)).complete) == 4


@pytest.mark.slow
def test_a_run_stops_when_its_time_is_up_and_resumes(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    """The time counts from the start of the process, which for a rank of the pool is long ago."""
    words = words_for(inputs, "--save", tmp_path, "--load", tmp_path)
    whole = ranks(2).run(run_sft_words, words=words_for(inputs))
    first = ranks(2).run(run_sft_words, words=[*words, "--exit-duration-in-mins", "0.001"])
    assert first[0]["stopped"] == (
        f"--exit-duration-in-mins 0.001 stopped the run at iteration 1; resume it with --load {tmp_path}"
    )
    second = ranks(2).run(run_sft_words, words=[*words, "--exit-duration-in-mins", "1e6"])
    for rank in range(2):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"]


@pytest.mark.slow
def test_a_run_stops_at_the_next_multiple_of_an_interval_and_resumes(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    """Also after a start between two of them, and not at the last iteration, after which nothing is left."""
    words = words_for(inputs, "--lr-decay-style", "constant")
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    [whole] = ranks(1).run(run_sft_words, words=words)
    parts = [
        ranks(1).run(run_sft_words, words=[*saved, "--exit-interval", interval, "--train-iters", length])[0]
        for interval, length in (("4", "3"), ("2", "6"), ("3", "6"))
    ]
    stopped = f"--exit-interval 2 stopped the run at iteration 4; resume it with --load {tmp_path}"
    assert [part["stopped"] for part in parts] == [None, stopped, None]
    assert [step for part in parts for step in part["steps"]] == whole["steps"]
    assert [path.name for path in sorted(tmp_path.glob("iter_*"))] == ["iter_0000003", "iter_0000004", "iter_0000006"]
