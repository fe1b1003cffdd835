"""--no-load-optim: a run resumes with its weights, position and rate, and with an optimizer that begins anew.

Run: pytest tests/checkpoint/test_no_load_optim.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

TP2 = ["--tensor-model-parallel-size", "2"]
ROUNDS = ["--hft-round-interval", "3"]
KEPT = [*ROUNDS, "--hft-moments", "carry", "--hft-frozen-moments", "host"]
ANEW = "--no-load-optim"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("no_load_optim"))


def stopped_at(ranks: RankPools, words: list[str], folder: Path, iteration: int) -> None:
    ranks(2).run(run_sft_words, words=[*words, "--save", str(folder)], kill_at=iteration)


def resuming(ranks: RankPools, words: list[str], folder: Path, *options: str) -> list[dict[str, Any]]:
    """Results of ranks that resume from a copy of ``folder``."""
    copy = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    found: list[dict[str, Any]] = ranks(2).run(
        run_sft_words, words=[*words, "--save", str(copy), "--load", str(copy), *options]
    )
    return found


@pytest.mark.parametrize("dtype", ["--bf16", "--no-bf16"])
@pytest.mark.slow(reason="six runs")
def test_where_a_round_begins_anew_it_changes_nothing_and_within_a_round_it_does(
    dtype: str, ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, *ROUNDS, dtype, "--save-trained-only")
    for iteration, changes in ((3, False), (2, True)):
        folder = tmp_path / str(iteration)
        stopped_at(ranks, words, folder, iteration)
        usual, anew = resuming(ranks, words, folder), resuming(ranks, words, folder, ANEW)
        for one, other in zip(usual, anew, strict=True):
            assert (one["state"] != other["state"]) == changes
            assert (one["steps"] != other["steps"]) == changes
            for name in ("iteration", "consumed", "lr"):
                assert [step[name] for step in one["steps"]] == [step[name] for step in other["steps"]]
        # The first loss is that of the same weights: what was frozen and left out came from the model's folder.
        assert usual[0]["steps"][0]["loss"] == anew[0]["steps"][0]["loss"]
        [line] = [line for line in anew[0]["said"] if line.startswith(f"> {ANEW}")]
        assert "moments start at zero and masters from the weights" in line


@pytest.mark.slow
def test_moments_of_frozen_units_are_gone_too_and_another_layout_takes_the_same_steps(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words, folder = words_for(inputs, *KEPT), tmp_path / "run"
    stopped_at(ranks, words, folder, 4)
    usual, anew = resuming(ranks, words, folder), resuming(ranks, words, folder, ANEW)
    elsewhere = resuming(ranks, [*words, *TP2], folder, ANEW)
    steps = [json.loads(found[0]["state"]["unit steps"]) for found in (usual, anew, elsewhere)]
    assert max(steps[0].values()) == 6
    assert set(steps[1].values()) == {2}
    assert steps[2] == steps[1]
    assert len(steps[1]) < len(steps[0])
    assert not any(name.startswith("frozen.") for name in anew[0]["state"])
    for one, other in zip(anew[0]["steps"], elsewhere[0]["steps"], strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)


@pytest.mark.slow
def test_a_new_run_from_other_weights_keeps_its_own_moments_when_it_resumes(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs)
    stopped_at(ranks, words, tmp_path / "first", 2)
    new = [*words, "--load", str(tmp_path / "first"), "--finetune", ANEW]
    whole = ranks(2).run(run_sft_words, words=new)
    saved = [*new, "--save", str(tmp_path / "second")]
    first = ranks(2).run(run_sft_words, words=saved, kill_at=3)
    second = ranks(2).run(run_sft_words, words=saved)
    assert first[0]["steps"] + second[0]["steps"] == whole[0]["steps"]
    assert second[0]["state"] == whole[0]["state"]
