"""A checkpoint folder is complete or not there, whatever moment a run dies at. Run: pytest tests/checkpoint"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.checkpoint.position import TrainState, newest_checkpoint
from hft_megatron.errors import UserError
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for


class Died(Exception):
    pass


def run_and_die_while_saving(words: list[str], where: str) -> dict[str, Any]:
    """Dies at the second save, at the function named ``where``; what the folder then holds is what a kill leaves."""
    from hft_megatron.checkpoint import store

    calls = 0
    original = getattr(store, where)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Died
        return original(*args, **kwargs)

    with patch.object(store, where, dying):
        try:
            run_sft_words(words)
        except Died:
            return {"died": True}
    return {"died": False}


@pytest.mark.parametrize("where", ["_sharded_state", "write_atomically"])
def test_a_run_that_dies_while_saving_goes_on_from_the_checkpoint_before(
    where: str, ranks: RankPools, tmp_path: Path
) -> None:
    words = words_for(make_inputs(tmp_path), "--train-iters", 4)
    save = tmp_path / "run"
    saved = [*words, "--save", str(save), "--load", str(save), "--save-interval", "2"]
    [whole] = ranks(1).run(run_sft_words, words=words)
    assert ranks(1).run(run_and_die_while_saving, words=saved, where=where) == [{"died": True}]
    found = newest_checkpoint(str(save))
    assert found is not None
    assert found.name == "iter_0000002"
    [resumed] = ranks(1).run(run_sft_words, words=saved)
    assert resumed["steps"] == whole["steps"][2:]
    assert resumed["state"] == whole["state"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    assert not list(save.glob("*.unfinished"))
    assert [json.loads(line)["iteration"] for line in (save / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_a_folder_without_a_tracker_holds_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000002").mkdir()
    assert newest_checkpoint(str(tmp_path)) is None
    assert newest_checkpoint(str(tmp_path / "absent")) is None


@pytest.mark.parametrize(("text", "said"), [("two", "holds 'two'"), ("7", "names iteration 7"), ("", "holds ''")])
def test_a_broken_tracker_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        newest_checkpoint(str(tmp_path))


def test_the_position_reads_back_as_it_was_written(tmp_path: Path) -> None:
    state = TrainState(iteration=7, consumed_samples=28, round=1, tensor_model_parallel_size=2)
    state.write(tmp_path)
    assert TrainState.read(tmp_path) == state
