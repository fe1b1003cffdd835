"""A checkpoint folder is complete or not there, whatever moment a run dies at. Run: pytest tests/checkpoint"""

import json
from pathlib import Path
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
def test_a_run_that_dies_while_saving_goes_on_from_the_newest_complete_checkpoint(
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
    skipped = [line for line in resumed["said"] if "is skipped: it is not complete" in line]
    behind = [line for line in resumed["said"] if "is newer than iteration 2" in line]
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
