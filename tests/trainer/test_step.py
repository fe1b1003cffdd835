"""Steps beside those of the run matrix: recomputation, validation in between, and determinism."""

from hashlib import sha256
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hft_megatron.model.layers import LlamaMLP
from hft_megatron.parallel.groups import make_deterministic
from hft_megatron.trainer.validation import validate
from tests.support.models import LAYOUTS, make_llama
from tests.support.tiers import quick
from tests.support.toy_training import TINY, local_weights, make_run, take_steps

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("steps") / "model", **TINY))


def run_counting_forward_passes(folder: str, training: dict) -> int:
    """How often one step calls a feed-forward block."""
    with patch.object(LlamaMLP, "forward", autospec=True, side_effect=LlamaMLP.forward) as forward:
        take_steps(make_run(folder, {}, training={"micro_batch_size": 8, **training}), 1)
    return forward.call_count


def test_full_recompute_runs_every_layer_twice(ranks, folder):
    plain, recomputed = (
        ranks(1).run(run_counting_forward_passes, folder=folder, training=options) for options in ({}, RECOMPUTE)
    )
    assert (plain, recomputed) == ([4], [8])


def run_validating(folder: str, layout: dict, each_step: bool) -> list[Any]:
    run = make_run(folder, layout, training={"micro_batch_size": 2})
    results: list[Any] = []
    for _ in range(4):
        results += take_steps(run, 1)
        if each_step:
            results.append(validate(run).together.get("lm loss"))
    return results if each_step else [*results, validate(run).together.get("lm loss")]


def test_validation_does_not_disturb_training_and_its_loss_does_not_depend_on_the_layout(ranks, folder):
    layouts = {"pp2": LAYOUTS["pp2"], "dp2": OVERLAP}
    with_validation = {
        name: ranks(2).run(run_validating, folder=folder, layout=layout, each_step=True)[1]
        for name, layout in layouts.items()
    }
    without = ranks(2).run(run_validating, folder=folder, layout=OVERLAP, each_step=False)[1]
    assert with_validation["dp2"][::2] == without[:4]
    assert with_validation["dp2"][-1] == without[4]
    assert with_validation["pp2"][1::2] == pytest.approx(with_validation["dp2"][1::2], rel=1e-5)
    assert len({*with_validation["pp2"][1::2]}) == 4


def run_deterministically(folder: str, layout: dict) -> dict[str, Any]:
    """Losses, norms and a digest of every weight's bits after six steps under --deterministic-mode."""
    make_deterministic()
    try:
        run = make_run(folder, layout, training={"micro_batch_size": 2, "deterministic_mode": True})
        results = take_steps(run, 6)
    finally:
        torch.use_deterministic_algorithms(False)
    weights = local_weights(run)
    bits = {name: sha256(weight.numpy().tobytes()).hexdigest() for (_, name), weight in weights.items()}
    return {"results": results, "bits": bits}


@pytest.mark.parametrize("layout", quick(["tp2_sp", "tp2_pp2", "dp2"], ["dp2"]))
def test_two_deterministic_runs_are_equal_bit_for_bit(ranks, folder, layout):
    options = LAYOUTS[layout] | (OVERLAP if layout == "dp2" else {})
    first, second = (
        ranks(4 if layout == "tp2_pp2" else 2).run(run_deterministically, folder=folder, layout=options)
        for _ in range(2)
    )
    assert first == second
