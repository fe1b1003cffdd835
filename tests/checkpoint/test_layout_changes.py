"""A checkpoint goes on at any other layout: losses, weights, moments and step counts are those of the run that stayed.

Every case stops after 3 of 6 steps, goes on elsewhere, and is compared with a run on one rank that never stopped.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.tiers import quick

TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "20000"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, []),
    "dp2 overlap": (2, OVERLAP),
    "tp2 sp": (2, [*TP2, *SP]),
    "pp2": (2, PP2),
    "pp2 vpp": (2, [*PP2, *VPP]),
    "dp4": (4, []),
    "pp4": (4, PP4),
    "tp2 pp2": (4, [*TP2, *PP2]),
    "tp2 dp2": (4, [*TP2, *OVERLAP]),
    "pp2 vpp dp2": (4, [*PP2, *VPP]),
    "tp2 pp2 dp2": (8, [*TP2, *SP, *PP2]),
    "pp4 dp2": (8, PP4),
    "dp4 tp2": (8, TP2),
}
"""World size and options."""

ROUNDS = ["--hft-round-interval", "2"]
CARRY = [*ROUNDS, "--hft-moments", "carry"]
HOST = [*CARRY, "--hft-resting-moments", "host"]
IDLE = ["--hft-freeze-embedding", "--hft-freeze", "model.layers.0.*,model.layers.1.*"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "one round": ("gqa", []),
    "tied": ("tied", []),
    "carried": ("gqa", CARRY),
    "carried, resting kept": ("tied", HOST),
    "idle first half": ("gqa", IDLE),
}
"""Model and options. Plans differ per layer in all of them; carried moments have different ages."""

CHANGES = [
    ("tp1", "tp2 pp2 dp2", "one round"),
    ("tp1", "pp2 vpp", "carried"),
    ("dp2 overlap", "tp2 sp", "carried, resting kept"),
    ("tp2 sp", "dp2 overlap", "tied"),
    ("pp2", "pp2 vpp dp2", "tied"),
    ("pp2 vpp", "tp1", "carried, resting kept"),
    ("pp2 vpp", "pp4", "one round"),
    ("pp4", "tp2 dp2", "idle first half"),
    ("tp2 pp2", "dp4", "carried"),
    ("tp2 dp2", "pp2", "idle first half"),
    ("dp4", "pp4 dp2", "carried"),
    ("tp2 pp2 dp2", "tp1", "carried, resting kept"),
    ("pp4 dp2", "dp4 tp2", "one round"),
    ("dp4 tp2", "pp2 vpp", "tied"),
]
"""Saved at, resumed at, and what was trained."""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {variant: make_inputs(tmp_path_factory.mktemp(variant), variant) for variant in ("gqa", "tied")}


def words_of(inputs: dict[str, Path], method: str, layout: str, *more: object) -> list[str]:
    variant, options = METHODS[method]
    return words_for(inputs[variant], *options, "--global-batch-size", 8, *LAYOUTS[layout][1], *more)


def read_whole(folder: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by its name in the model; on a rank of a pool."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(folder)
    return {name: t for name, t in found.items() if isinstance(t, Tensor) and not name.startswith("random_state")}


def largest_differences(one: str, other: str) -> dict[str, float]:
    """Tensor name -> largest difference over the largest value; infinite where a tensor is not in both."""
    here, there = read_whole(one), read_whole(other)
    differences = dict.fromkeys(here.keys() ^ there.keys(), float("inf"))
    for name in here.keys() & there.keys():
        rows = min(len(here[name]), len(there[name]))  # rows that pad the vocabulary differ with TP
        a, b = here[name][:rows].double(), there[name][:rows].double()
        scale = max(float(a.abs().max()), 1e-12)
        differences[name] = float((a - b).abs().max()) / scale
    return differences


@pytest.fixture(scope="session")
def stayed(ranks: RankPools, inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """method -> what the run on one rank returned, and its last checkpoint."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(method: str) -> tuple[dict[str, Any], Path]:
        if method not in done:
            save = tmp_path_factory.mktemp("stayed")
            [answer] = ranks(1).run(run_sft_words, words=words_of(inputs, method, "tp1", "--save", save))
            done[method] = answer, save / "iter_0000006"
        return done[method]

    return run


@pytest.mark.parametrize("change", quick(CHANGES, [("dp2 overlap", "tp2 sp", "carried, resting kept")]), ids=" - ".join)
def test_a_checkpoint_goes_on_at_another_layout(
    change: tuple[str, str, str], ranks: RankPools, inputs: dict[str, Path], stayed: Any, tmp_path: Path
) -> None:
    saved_at, resumed_at, method = change
    whole, last = stayed(method)
    folder = ["--save", tmp_path, "--load", tmp_path]
    ranks(LAYOUTS[saved_at][0]).run(run_sft_words, words=words_of(inputs, method, saved_at, *folder), kill_at=3)
    resumed = ranks(LAYOUTS[resumed_at][0]).run(run_sft_words, words=words_of(inputs, method, resumed_at, *folder))

    assert [step["iteration"] for step in resumed[-1]["steps"]] == [4, 5, 6]
    losses = [[step["loss"] for step in steps] for steps in (resumed[-1]["steps"], whole["steps"][3:])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    norms = [[step["grad_norm"] for step in steps] for steps in (resumed[-1]["steps"], whole["steps"][3:])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert resumed[-1]["state"]["unit steps"] == whole["state"]["unit steps"]
    if method.startswith("carried"):
        assert len(set(json.loads(whole["state"]["unit steps"]).values())) > 1

    [differences] = ranks(1).run(largest_differences, one=str(last), other=str(tmp_path / "iter_0000006"))
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in differences)
    assert any(name.startswith("resting.exp_avg.") for name in differences) == (method == "carried, resting kept")
    off = {name: difference for name, difference in differences.items() if difference > 2e-4}
    assert not off


MOVES = [("tp2 sp", "dp2 overlap"), ("pp2 vpp", "tp2 pp2"), ("tp2 pp2 dp2", "pp4"), ("dp4", "tp2 sp")]
"""Saved at, and saved again at, without a step in between."""


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES, ids=" - ".join)
def test_bf16_masters_and_moments_move_to_another_layout_without_losing_a_bit(
    move: tuple[str, str], ranks: RankPools, inputs: dict[str, Path], tmp_path: Path
) -> None:
    saved_at, resumed_at = move
    method = "carried, resting kept"
    words = {layout: words_of(inputs, method, layout, "--bf16", "--train-iters", 3) for layout in move}
    ranks(LAYOUTS[saved_at][0]).run(run_sft_words, words=[*words[saved_at], "--save", str(tmp_path / "one")])
    again = [*words[resumed_at], "--load", str(tmp_path / "one"), "--save", str(tmp_path / "other")]
    ranks(LAYOUTS[resumed_at][0]).run(run_sft_words, words=again)
    one, other = (str(tmp_path / name / "iter_0000003") for name in ("one", "other"))
    [differences] = ranks(1).run(largest_differences, one=one, other=other)
    assert any(name.startswith("optimizer.state.param.") for name in differences), "fp32 masters"
    assert set(differences.values()) == {0.0}


@pytest.mark.slow
def test_the_comparison_sees_a_tensor_that_differs(ranks: RankPools, stayed: Any) -> None:
    _, one = stayed("one round")
    _, other = stayed("tied")
    [differences] = ranks(1).run(largest_differences, one=str(one), other=str(other))
    assert max(differences.values()) > 2e-4
    assert torch.inf in differences.values()
