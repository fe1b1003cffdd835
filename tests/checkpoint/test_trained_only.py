"""Checkpoints that leave out what rests: small, exact on resume, tied to their base. Run: pytest tests/checkpoint"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hft_megatron.checkpoint.folders import find_checkpoints
from hft_megatron.checkpoint.position import TrainState
from tests.checkpoint.test_verification import flip_a_bit, run_refused
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

ONLY = ["--save-trained-only", "--save-interval", "1"]
LAYOUTS = {"dp2": [], "tp2": ["--tensor-model-parallel-size", "2"]}
ROUNDS = ["--hft-round-interval", "3", "--hft-moments", "carry"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A small vocabulary next to the layers: embedding and head always train.
    return make_inputs(tmp_path_factory.mktemp("trained_only"), hidden_size=128, intermediate_size=344)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.distcp"))


def bases(run: Path) -> dict[int, int | str]:
    """iteration -> iteration of its base, ``folder`` for the --load-hf folder, or ``whole``."""
    states = [TrainState.read(path) for path in find_checkpoints(str(run)).complete]
    return {
        state.iteration: "whole"
        if state.is_whole
        else "folder"
        if state.base_iteration is None
        else state.base_iteration
        for state in states
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_saved_without_its_resting_weights_goes_on_to_the_same_bits(
    layout: str, ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, *LAYOUTS[layout], *ROUNDS)
    run = tmp_path / "run"
    saved = [*words, *ONLY, "--save", str(run), "--load", str(run)]
    whole = ranks(2).run(run_sft_words, words=words)
    parts = [ranks(2).run(run_sft_words, words=saved, kill_at=stop) for stop in (2, 4, 5, None)]
    for rank in range(2):
        assert [step for part in parts for step in part[rank]["steps"]] == whole[rank]["steps"]
        assert parts[-1][rank]["state"] == whole[rank]["state"]
    # The first round is based on the model's folder; in the second the first save is whole, and the base of the others.
    assert bases(run) == {1: "folder", 2: "folder", 3: "folder", 4: "whole", 5: 4, 6: 4}


def test_the_size_is_about_the_trained_share(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    sizes = {}
    for name, options in {"full": ["--hft-ratio", "1"], "whole": [], "only": ["--save-trained-only"]}.items():
        words = words_for(inputs, *options, "--save", tmp_path / name, "--train-iters", 3, "--bf16")
        ranks(1).run(run_sft_words, words=words)
        sizes[name] = size_of(tmp_path / name / "iter_0000003")
    trained = trained_share(tmp_path / "only", inputs)
    assert sizes["only"] / sizes["full"] == pytest.approx(trained, abs=0.02)
    assert sizes["only"] < sizes["whole"] < sizes["full"]


def trained_share(run: Path, inputs: Path) -> float:
    from hft_megatron.config.model_shape import ModelShape, load_hf_config
    from hft_megatron.hft.plan import Plan

    shape = ModelShape.from_hf_config(load_hf_config(str(inputs / "model")), "model")
    plan = Plan.from_json((run / "iter_0000003" / "plan.json").read_text(), shape=shape, source="plan.json")
    return plan.trainable_parameters / (plan.trainable_parameters + plan.frozen_parameters)


@pytest.fixture(scope="session")
def two_rounds(ranks: RankPools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two_rounds") / "run"
    words = words_for(inputs, *ROUNDS, *ONLY, "--save", run, "--lr-decay-style", "constant")
    ranks(2).run(run_sft_words, words=words)
    return run


def going_on(inputs: Path, run: Path, *options: object) -> list[str]:
    return words_for(inputs, *ROUNDS, "--lr-decay-style", "constant", "--train-iters", 7, "--load", run, *options)


def test_a_base_that_is_gone_damaged_or_another_one_is_named(
    ranks: RankPools, inputs: Path, two_rounds: Path, tmp_path: Path
) -> None:
    def refusal(name: str, harm: Any) -> str:
        run = shutil.copytree(two_rounds, tmp_path / name)
        harm(run / "iter_0000004")
        [said, _] = ranks(2).run(run_refused, words=going_on(inputs, run))
        return str(said)

    assert "its base" in (said := refusal("gone", shutil.rmtree))
    assert said.endswith("the newest good checkpoint is iter_0000003: add --load-fallback to go on from it.")
    assert "iter_0000004/common.pt is not what was saved" in refusal(
        "damaged", lambda base: flip_a_bit(base / "common.pt")
    )

    def replace(base: Path) -> None:
        listed = (base / "digests.json").read_text()
        (base / "digests.json").write_text(listed + "\n")

    assert "is not the base of iter_0000006" in refusal("another", replace)


def test_another_model_folder_than_the_base_is_refused_with_both_digests(
    ranks: RankPools, inputs: Path, two_rounds: Path, tmp_path: Path
) -> None:
    """A run's identity looks at the beginning of every tensor; what was left out is checked to the last byte."""
    run = shutil.copytree(two_rounds, tmp_path / "run")
    for iteration in (4, 5, 6):
        shutil.rmtree(run / f"iter_000000{iteration}")
    (run / "latest_checkpointed_iteration.txt").write_text("3\n")
    other = shutil.copytree(inputs / "model", tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][-1, -1] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    [said, _] = ranks(2).run(run_refused, words=going_on(inputs, run, "--load-hf", other))
    assert f"and --load-hf {other} has " in said
    [answer, _] = ranks(2).run(run_sft_words, words=going_on(inputs, run))
    assert [step["iteration"] for step in answer["steps"]] == [4, 5, 6, 7]
