"""The change of each weight between two models, and an audit of what was frozen. Run: pytest tests/evaluation"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.errors import UserError
from hft_megatron.evaluation.weight_changes import (
    UnitWeights,
    WeightChanges,
    folder_weights,
    run_weights,
    weight_changes,
)
from hft_megatron.hft.units import units_of
from hft_megatron.trainer.convert import units_trained
from tests.support.models import make_llama
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

DOWN, NORM, HEAD = "model.layers.2.mlp.down_proj", "model.layers.1.input_layernorm", "lm_head"


@contextmanager
def opened(path: Path, iteration: int | None = None) -> Iterator[UnitWeights]:
    """A model folder, or the folder of a run."""
    if (path / "config.json").exists():
        with folder_weights(str(path), option="--model") as weights:
            yield weights
    else:
        with run_weights(SavedRun.read(str(path), iteration)) as weights:
            yield weights


def compared(base: Path, tuned: Path, iteration: int | None = None) -> WeightChanges:
    with opened(base) as first, opened(tuned, iteration) as second:
        return weight_changes(first, second)


def edit(folder: Path, edits: dict[str, Any]) -> dict[str, Tensor]:
    weights = load_file(folder / "model.safetensors")
    for unit, change in edits.items():
        weights[f"{unit}.weight"] = change(weights[f"{unit}.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def add_to_the_first(weight: Tensor) -> Tensor:
    weight[0] += 1
    return weight


def test_a_change_is_the_frobenius_norm_of_the_difference_over_that_of_the_weight(tmp_path: Path) -> None:
    base, tuned = make_llama(tmp_path / "base"), make_llama(tmp_path / "tuned")
    edit(tuned, {DOWN: lambda weight: weight * 1.25, NORM: lambda weight: -weight, HEAD: add_to_the_first})
    found = compared(base, tuned)
    changes = {unit.unit: unit for unit in found.units}
    before = load_file(base / "model.safetensors")
    assert {f"{unit}.weight" for unit in changes} == before.keys()
    assert {name for name, change in changes.items() if not change.is_same} == {DOWN, NORM, HEAD}
    assert changes[DOWN].relative == pytest.approx(0.25, rel=1e-7)
    assert changes[NORM].relative == 2.0
    # One row of 64 has moved by 1.
    assert changes[HEAD].changed == 64
    assert changes[HEAD].relative == pytest.approx(8 / float(before[f"{HEAD}.weight"].double().norm()), rel=1e-6)
    assert (changes[DOWN].category, changes[DOWN].layer, changes[HEAD].layer) == ("feed_forward", 2, None)
    categories = found.by_category()
    assert sum(one.parameters for one in categories.values()) == sum(weight.numel() for weight in before.values())
    assert categories["attention"].relative == 0.0
    feed_forward = torch.cat([weight.double().flatten() for name, weight in before.items() if ".mlp." in name])
    moved = 0.25 * before[f"{DOWN}.weight"].double().norm()
    assert categories["feed_forward"].relative == pytest.approx(float(moved / feed_forward.norm()), rel=1e-7)
    assert found.whole().changed == before[f"{DOWN}.weight"].numel() + 64 + 64
    assert found.changed_though_frozen(frozenset({DOWN, HEAD})) == (NORM,)


def test_a_base_is_rounded_to_the_tuned_models_type_and_never_the_other_way(tmp_path: Path) -> None:
    base, bf16 = make_llama(tmp_path / "base"), make_llama(tmp_path / "bf16")
    edit(bf16, {unit.unit: Tensor.bfloat16 for unit in compared(base, base).units})
    assert compared(base, bf16).whole().changed == 0
    # From bf16 to fp32 nothing is rounded: what bf16 could not hold is a change.
    changes = compared(bf16, base)
    assert 0 < changes.whole().relative < 2**-8
    assert not any(unit.is_same for unit in changes.units if unit.category == "attention")


def test_a_weight_that_was_zero_has_changed_without_measure(tmp_path: Path) -> None:
    base, tuned = make_llama(tmp_path / "base"), make_llama(tmp_path / "tuned")
    edit(base, {DOWN: torch.zeros_like, NORM: torch.zeros_like})
    edit(tuned, {NORM: torch.zeros_like})
    changes = {unit.unit: unit.relative for unit in compared(base, tuned).units}
    assert (changes[DOWN], changes[NORM]) == (math.inf, 0.0)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("tied", "lm_head is of shape [96, 64] in the one and missing in the other"),
        ("odd_vocab", "model.embed_tokens is of shape [96, 64] in the one and of shape [97, 64] in the other"),
    ],
)
def test_models_of_other_shapes_are_refused_with_both_names(variant: str, said: str, tmp_path: Path) -> None:
    base, tuned = make_llama(tmp_path / "base"), make_llama(tmp_path / "tuned", variant)
    with pytest.raises(UserError) as error:
        compared(base, tuned)
    message = str(error.value)
    assert said in message
    assert f"--model {base} and --model {tuned}" in message


CASES: dict[str, tuple[torch.dtype, list[str]]] = {
    "bf16 from fp32": (torch.float32, ["--bf16", "--tensor-model-parallel-size", "2"]),
    "fp32 from bf16, trained weights of rounds only": (
        torch.bfloat16,
        ["--no-bf16", "--save-trained-only", "--hft-round-interval", "2", "--hft-rotation", "complementary"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_a_run_froze_has_not_changed(case: str, ranks: RankPools, tmp_path: Path) -> None:
    dtype, options = CASES[case]
    inputs = make_inputs(tmp_path, dtype=dtype)
    words = words_for(inputs, "--train-iters", 4, "--save-interval", 2, "--lr-warmup-iters", 0, *options)
    own = ["--save", str(tmp_path / "run"), "--save-hf", str(tmp_path / "own"), "--save-dtype", "float32"]
    ranks(2).run(run_sft_words, words=[*words, *own])
    for iteration in (2, 4):
        run = SavedRun.read(str(tmp_path / "run"), iteration)
        trained = units_trained(run)
        changes = compared(inputs / "model", tmp_path / "run", iteration)
        matrices = {unit.unit for unit in changes.units if unit.category in ("attention", "feed_forward")}
        moved = {unit.unit for unit in changes.units if not unit.is_same}
        assert changes.changed_though_frozen(trained) == ()
        assert moved & matrices == trained & matrices
        assert changes.changed_though_frozen(frozenset()) == tuple(
            unit.name for unit in units_of(run.identity.shape) if unit.name in moved
        )
    # The run's own export says the same of the end, but for the rounding of the base.
    exported = compared(inputs / "model", tmp_path / "own")
    assert exported.changed_though_frozen(trained) == ()
    in_run = {unit.unit: unit.relative for unit in changes.units if unit.unit in matrices}
    assert {unit.unit: unit.relative for unit in exported.units if unit.unit in matrices} == pytest.approx(
        in_run, rel=0.01
    )
