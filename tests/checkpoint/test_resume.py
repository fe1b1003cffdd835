"""A run that stops and goes on is the run that never stopped. Run: pytest tests/checkpoint/test_resume.py"""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.hft.plan import Plan
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.tiers import quick

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "20000"]
VPP = [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]

CASES: dict[str, tuple[int, str, list[str]]] = {
    "tp1 accumulating": (1, "gqa", []),
    "tp1 bf16": (1, "gqa", ["--bf16"]),
    "tp1 tied": (1, "tied", []),
    "tp1 full": (1, "gqa", ["--hft-ratio", "1"]),
    "dp2": (2, "gqa", ["--micro-batch-size", "2"]),
    "dp2 bf16": (2, "gqa", ["--bf16"]),
    "dp2 overlap": (2, "gqa", OVERLAP),
    "dp2 overlap bf16 tied": (2, "tied", [*OVERLAP, "--bf16"]),
    "tp2 sp": (2, "gqa", [*TP2, "--sequence-parallel"]),
    "pp2": (2, "gqa", PP2),
    "pp2 tied bf16": (2, "tied", [*PP2, "--bf16"]),
    "pp2 vpp": (2, "gqa", VPP),
    "tp2 pp2": (4, "gqa", [*TP2, *PP2]),
    "tp2 pp2 bf16 tied": (4, "tied", [*TP2, *PP2, "--bf16"]),
    "dp2 pp2 overlap": (4, "tied", [*PP2, *OVERLAP]),
}
"""World size, model and options. 6 steps of 4 sequences, stopped after the third."""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {variant: make_inputs(tmp_path_factory.mktemp(variant), variant) for variant in ("gqa", "tied")}


def losses(values: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in values[-1]["steps"]]


def run_whole_and_in_two(
    ranks: RankPools, world_size: int, words: list[str], folder: Path, *, kill_at: int
) -> list[dict[str, Any]]:
    """What each rank returned of a run that never stopped, which one stopped after ``kill_at`` must equal."""
    pool = ranks(world_size)
    whole = pool.run(run_sft_words, words=words)
    saved = [*words, "--save", str(folder), "--load", str(folder)]
    # The last rank alone gets the signal: all must stop at the same step.
    first = pool.run(run_sft_words, words=saved, kill_at=kill_at, kill_rank=world_size - 1)
    second = pool.run(run_sft_words, words=saved)

    assert [rank["stopped"] is None for rank in first] == [False] * world_size
    assert [step["iteration"] for step in second[0]["steps"]] == list(range(kill_at + 1, 7))
    for rank in range(world_size):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"]
        different = {
            name for name in whole[rank]["state"] if whole[rank]["state"][name] != second[rank]["state"].get(name)
        }
        assert not different, f"rank {rank}"
        assert whole[rank]["state"].keys() == second[rank]["state"].keys()
    assert all(isinstance(loss, float) for loss in losses(whole))
    assert max(step["lr"] for step in whole[-1]["steps"]) > 0, "else nothing was trained"
    return whole


@pytest.mark.parametrize("case", quick(CASES, ["tp1 bf16", "dp2 overlap bf16 tied", "pp2 vpp"]))
def test_resume_equals_uninterrupted_to_the_last_bit(
    case: str, ranks: RankPools, inputs: dict[str, Path], tmp_path: Path
) -> None:
    world_size, variant, options = CASES[case]
    whole = run_whole_and_in_two(ranks, world_size, words_for(inputs[variant], *options), tmp_path, kill_at=3)
    assert set(json.loads(whole[0]["state"]["unit steps"]).values()) == {6}


ROUNDS = ["--hft-round-interval", "2"]
HIFT = ["--hft-selection", "hift", "--hft-ratio", "0.3", "--lr-warmup-iters", "0"]
HOST = ["--hft-moments", "carry", "--hft-resting-moments", "host"]
ROUND_CASES: dict[str, tuple[int, str, list[str], int, set[int]]] = {
    "at a switch, fresh moments": (1, "gqa", ROUNDS, 4, {2}),
    "within a round, carried moments": (
        2,
        "tied",
        [*ROUNDS, *OVERLAP, "--bf16", "--hft-moments", "carry"],
        3,
        {2, 4, 6},
    ),
    "within a round, resting moments kept": (4, "tied", [*ROUNDS, *HOST, *TP2, *PP2, "--bf16"], 3, {2, 4, 6}),
    "at a switch, resting moments kept": (2, "gqa", [*ROUNDS, *HOST, *OVERLAP], 4, {2, 4, 6}),
    "groups in turn, so that one stage rests": (2, "gqa", [*ROUNDS, *HIFT, *PP2], 3, {2}),
    "scores computed once": (
        2,
        "gqa",
        [*ROUNDS, "--hft-selection", "spectrum", "--hft-rotation", "complementary"],
        3,
        {2},
    ),
    "a rate of its own in every round": (1, "gqa", ["--hft-round-interval", "4", "--hft-lr-schedule", "round"], 3, {2}),
}
"""World size, model, options, the iteration to stop after, and the step counts that units have in the end."""


@pytest.mark.parametrize("case", quick(ROUND_CASES, ["at a switch, fresh moments"]))
def test_resume_equals_uninterrupted_across_rounds(
    case: str, ranks: RankPools, inputs: dict[str, Path], tmp_path: Path
) -> None:
    world_size, variant, options, kill_at, steps = ROUND_CASES[case]
    words = words_for(inputs[variant], *options)
    whole = run_whole_and_in_two(ranks, world_size, words, tmp_path, kill_at=kill_at)
    assert set(json.loads(whole[0]["state"]["unit steps"]).values()) == steps


def test_the_plans_of_these_cases_differ_per_layer(ranks: RankPools, inputs: dict[str, Path], tmp_path: Path) -> None:
    model = inputs["gqa"] / "model"
    words = words_for(inputs["gqa"], "--train-iters", 1, "--save", tmp_path, "--lr-warmup-iters", 0)
    ranks(1).run(run_sft_words, words=words)
    shape = ModelShape.from_hf_config(load_hf_config(str(model)), "model")
    plan = Plan.from_json((tmp_path / "iter_0000001" / "plan.json").read_text(), shape=shape, source="plan.json")
    trained = [
        frozenset(name.split(".", 3)[3] for name in plan.training if f".layers.{layer}." in name) for layer in range(4)
    ]
    assert len(set(trained)) == 4


def test_a_run_goes_on_to_another_number_of_iterations(
    ranks: RankPools, inputs: dict[str, Path], tmp_path: Path
) -> None:
    words = words_for(inputs["gqa"], "--lr-decay-style", "constant")
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    [whole] = ranks(1).run(run_sft_words, words=words)
    [first] = ranks(1).run(run_sft_words, words=[*saved, "--train-iters", "3"])
    [second] = ranks(1).run(run_sft_words, words=saved)
    assert first["steps"] + second["steps"] == whole["steps"]
    assert second["state"] == whole["state"]


PP4 = ["--pipeline-model-parallel-size", "4", "--lr-decay-style", "constant"]
BELOW = ["--hft-freeze-embedding", "--hft-freeze", "model.layers.0.*,model.layers.1.*"]
IDLE = {
    "all stages but the last": (4, [*PP4, "--hft-freeze-embedding", "--hft-ratio", "0"], [0, 1, 2]),
    "the stages between embedding and head": (4, [*PP4, "--hft-ratio", "0"], [1, 2]),
    "the first stage": (2, [*PP2, "--lr-decay-style", "constant", *BELOW], [0]),
}
"""World size, options and the ranks that own nothing to train."""


@pytest.mark.parametrize("case", quick(IDLE, ["the first stage"]))
def test_a_pipeline_stage_with_nothing_to_train_saves_and_resumes(
    case: str, ranks: RankPools, inputs: dict[str, Path], tmp_path: Path
) -> None:
    world_size, options, expected = IDLE[case]
    pool, words = ranks(world_size), words_for(inputs["gqa"], *options, "--train-iters", 4, "--lr-warmup-iters", 0)
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    whole = pool.run(run_sft_words, words=words)
    first = pool.run(run_sft_words, words=[*saved, "--train-iters", "2"])
    second = pool.run(run_sft_words, words=saved)
    idle = [rank for rank in range(world_size) if not any("exp_avg" in name for name in whole[rank]["state"])]
    assert idle == expected
    for rank in range(world_size):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"]
        assert second[rank]["state"] == whole[rank]["state"]
    assert losses(whole)[-1] < losses(whole)[0]


def test_a_finished_run_has_nothing_left_to_do(ranks: RankPools, inputs: dict[str, Path], tmp_path: Path) -> None:
    words = words_for(inputs["gqa"], "--train-iters", 3, "--save", tmp_path, "--load", tmp_path)
    [done] = ranks(1).run(run_sft_words, words=words)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "iter_0000003").iterdir()}
    [again] = ranks(1).run(run_sft_words, words=words)
    assert again["steps"] == []
    assert {name: value for name, value in again["state"].items() if name != "learning rate"} == {
        name: value for name, value in done["state"].items() if name != "learning rate"
    }
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "iter_0000003").iterdir()} == before
