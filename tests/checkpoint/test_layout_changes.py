"""A checkpoint of bf16 moves to another layout to the bit; tests/trainer/test_run_matrix.py trains on at others."""

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import largest_differences
from tests.support.models import LAYOUTS, flags
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

CARRIED = ["--hft-round-interval", "2", "--hft-moments", "carry", "--hft-frozen-moments", "host"]
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 20000}
PLACES = {
    "tp2 sp": (2, LAYOUTS["tp2_sp"]),
    "dp2 overlap": (2, OVERLAP),
    "tp2 pp2 dp2": (8, LAYOUTS["tp2_pp2"] | {"sequence_parallel": True}),
    "pp4": (4, LAYOUTS["pp4"]),
}
"""World size and layout."""
MOVES = [("tp2 sp", "dp2 overlap"), ("tp2 pp2 dp2", "pp4")]
"""Saved at, and saved again at, without a step in between."""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("tied"), "tied")


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES, ids=" - ".join)
def test_bf16_masters_and_moments_move_to_another_layout_without_losing_a_bit(
    move: tuple[str, str], ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    one, other = (tmp_path / name for name in ("one", "other"))
    for place, folders in zip(move, (["--save", one], ["--load", one, "--save", other]), strict=True):
        world_size, layout = PLACES[place]
        options = [*CARRIED, *flags(layout), "--global-batch-size", 8, "--bf16", "--train-iters", 3, *folders]
        ranks(world_size).run(run_sft_words, words=words_for(inputs, *options))
    saved = [str(folder / "iter_0000003") for folder in (one, other)]
    [differences] = ranks(1).run(largest_differences, one=saved[0], other=saved[1])
    assert any(name.startswith("optimizer.state.param.") for name in differences), "fp32 masters"
    assert set(differences.values()) == {0.0}


@pytest.mark.slow
def test_the_comparison_sees_tensors_that_differ_and_that_are_missing(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    for name, rounds in (("one", []), ("other", CARRIED)):
        words = words_for(inputs, *rounds, "--train-iters", 3, "--save", tmp_path / name)
        ranks(1).run(run_sft_words, words=words)
    saved = [str(tmp_path / name / "iter_0000003") for name in ("one", "other")]
    [differences] = ranks(1).run(largest_differences, one=saved[0], other=saved[1])
    assert max(value for value in differences.values() if value < torch.inf) > 2e-4
    assert torch.inf in differences.values()
