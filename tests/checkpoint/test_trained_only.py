"""Checkpoints that leave out frozen weights: small, exact, tied to their base. Run: pytest tests/checkpoint"""

import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.checkpoint.folders import chain_of, find_checkpoints
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.checkpoint.tensors import CheckpointTensors
from hft_megatron.errors import UserError
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.trainer.convert import convert_checkpoint
from tests.checkpoint.test_verification import flip_a_bit, run_refused
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

ONLY = ["--save-trained-only", "--save-interval", "1"]
LAYOUTS = {"dp2": [], "tp2": ["--tensor-model-parallel-size", "2"]}
TP2 = LAYOUTS["tp2"]
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
def test_a_run_saved_without_its_frozen_weights_resumes_to_the_same_bits(
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


@pytest.mark.slow
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


def resuming(inputs: Path, run: Path, *options: object) -> list[str]:
    return words_for(inputs, *ROUNDS, "--lr-decay-style", "constant", "--train-iters", 7, "--load", run, *options)


def test_a_base_that_is_gone_damaged_or_another_one_is_named(
    ranks: RankPools, inputs: Path, two_rounds: Path, tmp_path: Path
) -> None:
    def refusal(name: str, harm: Any) -> str:
        run = shutil.copytree(two_rounds, tmp_path / name)
        harm(run / "iter_0000004")
        [said, _] = ranks(2).run(run_refused, words=resuming(inputs, run))
        return str(said)

    assert "its base" in (said := refusal("gone", shutil.rmtree))
    assert said.endswith("the newest intact checkpoint is iter_0000003: add --load-fallback to resume from it.")
    assert "iter_0000004/common.pt is not as it was saved" in refusal(
        "damaged", lambda base: flip_a_bit(base / "common.pt")
    )

    def replace(base: Path) -> None:
        listed = (base / "digests.json").read_text()
        (base / "digests.json").write_text(listed + "\n")

    assert "is not the base of iter_0000006" in refusal("another", replace)


@pytest.fixture(scope="session")
def chain(ranks: RankPools, inputs: Path, two_rounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, each from the weights of the one before, all without what was frozen; the first had two rounds, the
    third was stopped once, and its export is beside it."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(two_rounds, folder / "first")
    second = based_on(inputs, folder, "first", "second", "--hft-first-round", 2)
    third = based_on(inputs, folder, "second", "third", "--hft-first-round", 3, "--save-hf", folder / "export")
    for words, kill_at in ((second, None), (third, 1), (third, None)):
        ranks(2).run(run_sft_words, words=words, kill_at=kill_at)
    return folder


def based_on(inputs: Path, folder: Path, before: str, run: str, *options: object) -> list[str]:
    words = ["--load", folder / before, "--finetune", "--save", folder / run, "--train-iters", 2, *TP2, *options]
    return words_for(inputs, *ONLY, "--lr-warmup-iters", 0, *words)


def run_opened(name: str) -> dict[str, str]:
    """sha256 of every parameter of a saved model as `hft-megatron evaluate` opens it."""
    from hft_megatron.config.parallel import ParallelConfig
    from hft_megatron.evaluation.saved_models import SavedModel
    from hft_megatron.model.parameters import parameter_slots
    from hft_megatron.parallel.groups import start_groups

    model = SavedModel.read(name)
    placement = start_groups(ParallelConfig(), model.shape.num_layers, 1)
    model.digest(placement)
    slots = list(parameter_slots(model.open(ParallelConfig(), placement, bf16=False).chunks))
    rows = {slot.unit: whole_shape(slot.unit, model.shape)[0] for slot in slots}
    return {slot.unit: sha256(slot.parameter[: rows[slot.unit]].numpy().tobytes()).hexdigest() for slot in slots}


@pytest.mark.slow
def test_runs_from_one_anothers_weights_are_deltas_down_to_the_model_or_a_whole_checkpoint(
    ranks: RankPools, inputs: Path, chain: Path, tmp_path: Path
) -> None:
    assert bases(chain / "second") == {1: 6, 2: 6}
    assert bases(chain / "third") == {1: 2, 2: 2}
    followed = [str(path.relative_to(chain)) for path, _ in chain_of(chain / "third" / "iter_0000002")]
    assert followed == [
        f"{name}/iter_000000{i}" for name, i in (("third", 2), ("second", 2), ("first", 6), ("first", 4))
    ]
    size = {name: size_of(chain / name) for name in ("first/iter_0000004", "third/iter_0000002")}
    assert size["third/iter_0000002"] < size["first/iter_0000004"]
    moved = shutil.copytree(chain, tmp_path / "moved")
    convert_checkpoint(str(moved / "third"), None, str(tmp_path / "out"), save_dtype=None, check=False, announce=print)
    export, converted = (load_file(folder / "model.safetensors") for folder in (chain / "export", tmp_path / "out"))
    assert all(torch.equal(converted[name], tensor) for name, tensor in export.items())
    [opened] = ranks(1).run(run_opened, name=str(moved / "third"))
    assert opened == {
        name.removesuffix(".weight"): sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in export.items()
    }


@pytest.mark.slow
def test_damage_in_the_base_of_a_base_is_found_and_named(
    ranks: RankPools, inputs: Path, chain: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chain, tmp_path / "chain")
    words = words_for(inputs, "--hft-first-round", 3, "--load", folder / "third")
    damaged = folder / "first" / "iter_0000004"
    flip_a_bit(damaged / "common.pt")
    [said, _] = ranks(2).run(run_refused, words=words)
    assert f"{damaged}/common.pt is not as it was saved" in said
    with pytest.raises(UserError, match=r"first/iter_0000004/common.pt is not as it was saved"):
        CheckpointTensors(folder / "third" / "iter_0000002", SavedRun.read(str(folder / "third"), None).identity.shape)
    shutil.rmtree(folder / "first")
    [said, _] = ranks(2).run(run_refused, words=words)
    assert f"its base {folder}/first/iter_0000006 cannot be read" in said
    with pytest.raises(
        UserError, match=r"--load .*/third: .*its base .*/first/iter_0000006 cannot be read .*; put that"
    ):
        SavedRun.read(str(folder / "third"), None).source()


@pytest.mark.slow
def test_a_run_of_another_precision_than_the_one_before_has_no_base_there(
    ranks: RankPools, inputs: Path, chain: Path, tmp_path: Path
) -> None:
    words = based_on(inputs, chain, "second", "third", "--bf16", "--save", tmp_path / "run")
    ranks(1).run(run_sft_words, words=[*words, "--tensor-model-parallel-size", "1"])
    assert bases(tmp_path / "run") == {1: "whole", 2: 1}


@pytest.mark.slow
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
    [said, _] = ranks(2).run(run_refused, words=resuming(inputs, run, "--load-hf", other))
    assert f"but --load-hf {other} has " in said
    [answer, _] = ranks(2).run(run_sft_words, words=resuming(inputs, run))
    assert [step["iteration"] for step in answer["steps"]] == [4, 5, 6, 7]
