"""A checkpoint folder is complete or not there, whatever moment a run dies at. Run: pytest tests/checkpoint"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.checkpoint.folders import find_checkpoints
from hft_megatron.checkpoint.position import TrainState
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for


class Died(Exception):
    pass


def run_and_die_while_saving(words: list[str], where: str) -> dict[str, Any]:
    """Dies at the second save, at the function named ``where``; what the folder then holds is what a kill leaves."""
    from hft_megatron.checkpoint import writer

    calls = 0
    original = getattr(writer, where)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Died
        return original(*args, **kwargs)

    with patch.object(writer, where, dying):
        try:
            run_sft_words(words)
        except Died:
            return {"died": True}
    return {"died": False}


@pytest.mark.parametrize(("where", "left"), [("sharded_state", 2), ("write_digests", 2), ("write_atomically", 4)])
def test_a_run_that_dies_while_saving_resumes_from_the_newest_complete_checkpoint(
    where: str, left: int, ranks: RankPools, tmp_path: Path
) -> None:
    words = words_for(make_inputs(tmp_path), "--train-iters", 5)
    save = tmp_path / "run"
    saved = [*words, "--save", str(save), "--load", str(save), "--save-interval", "2"]
    [whole] = ranks(1).run(run_sft_words, words=words)
    assert ranks(1).run(run_and_die_while_saving, words=saved, where=where) == [{"died": True}]
    newest = find_checkpoints(str(save)).newest
    assert newest is not None
    assert newest.name == f"iter_{left:07d}"
    [resumed] = ranks(1).run(run_sft_words, words=saved)
    skipped = [line for line in resumed["said"] if "skipping" in line and "it is incomplete" in line]
    behind = [line for line in resumed["said"] if "is complete and newer than iteration 2" in line]
    assert (len(skipped), len(behind)) == ((1, 0) if left == 2 else (0, 1))
    assert resumed["steps"] == whole["steps"][left:]
    assert resumed["state"] == whole["state"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    assert not list(save.glob("*.unfinished*"))
    assert [json.loads(line)["iteration"] for line in (save / "metrics.jsonl").open()] == [1, 2, 3, 4, 5]


def test_the_position_reads_back_as_it_was_written(tmp_path: Path) -> None:
    state = TrainState(iteration=7, consumed_samples=28, round=1, tensor_model_parallel_size=2)
    state.write(tmp_path)
    assert TrainState.read(tmp_path) == state


def run_until_the_other_waits(words: list[str], flags: str) -> dict[str, Any]:
    """Rank 1 writes its files only when rank 0 has written its own and waits where no collective is."""
    from hft_megatron.checkpoint import writer, writing
    from hft_megatron.parallel import meeting

    rank, write = int(os.environ["RANK"]), writing._write
    written, waits = Path(flags) / "written", Path(flags) / "waits"

    def write_last(*arguments: Any) -> None:
        deadline = time.monotonic() + 30
        while rank == 1 and not waits.exists():
            assert time.monotonic() < deadline, "rank 0 does not wait on the store"
            time.sleep(0.01)
        write(*arguments)
        if rank == 0:
            written.touch()

    def pause(seconds: float) -> None:
        if rank == 0 and written.exists():
            waits.touch()
        time.sleep(seconds)

    clock = SimpleNamespace(sleep=pause, perf_counter=time.perf_counter)
    with (
        patch.object(writing, "_write", write_last),
        patch.object(writer, "time", clock),
        patch.object(meeting, "time", clock),
    ):
        return run_sft_words(words)


@pytest.mark.parametrize("options", [[], ["--async-save"]], ids=["foreground", "background"])
def test_a_rank_that_has_written_waits_for_the_others_files_in_no_collective(
    options: list[str], ranks: RankPools, tmp_path: Path
) -> None:
    words = words_for(make_inputs(tmp_path), "--train-iters", 1, "--lr-warmup-iters", 0, *options)
    save = tmp_path / "run"
    ranks(2).run(run_until_the_other_waits, words=[*words, "--save", str(save)], flags=str(tmp_path), timeout=60)
    assert find_checkpoints(str(save)).newest == save / "iter_0000001"


def run_with_norms_like_transformer_engines(words: list[str]) -> dict[str, Any]:
    """Those have a state beside their weights (``_extra_state``), for FP8, which torch puts among the weights."""
    from hft_megatron.model.layers import RMSNorm

    with (
        patch.object(RMSNorm, "get_extra_state", lambda norm: b"scales"),
        patch.object(RMSNorm, "set_extra_state", lambda norm, state: None),
    ):
        return run_sft_words(words)


def test_a_run_with_transformer_engines_norms_resumes_and_without_them_too(ranks: RankPools, tmp_path: Path) -> None:
    words = words_for(make_inputs(tmp_path), "--lr-decay-style", "constant", "--lr-warmup-iters", 0)
    saved = [*words, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    [whole] = ranks(1).run(run_sft_words, words=words)
    steps = []
    for runs, iterations in (
        (run_with_norms_like_transformer_engines, 2),
        (run_with_norms_like_transformer_engines, 4),
        (run_sft_words, 6),
    ):
        [part] = ranks(1).run(runs, words=[*saved, "--train-iters", str(iterations)])
        steps += part["steps"]
    assert steps == whole["steps"]
    assert part["state"] == whole["state"]
