"""Packed steps equal a plain PyTorch loop over the same examples, each on its own, at every layout."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hft_megatron.config.schema import HFTConfig
from hft_megatron.model.parameters import local_slice, parameter_slots
from tests.support.models import LAYOUTS, make_llama
from tests.support.plain_training import plain_training, toy_plan
from tests.support.tiers import quick
from tests.support.toy_training import TINY, local_weights, make_run, take_steps, toy_samples

STEPS = 5
TOLERANCE = 1e-5
"""Relative, of losses and gradient norms; measured in fp32: below 1e-6."""
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1 one pack at a time": (1, {}, {"micro_batch_size": 1}),
    "tp1 two at a time": (1, {}, {"micro_batch_size": 2}),
    "tp1 recompute": (1, {}, {"micro_batch_size": 8, **FULL}),
    "tp1 selective recompute": (1, {}, {"micro_batch_size": 4, **SELECTIVE}),
    "dp2 accumulating": (2, {}, {"micro_batch_size": 2}),
    "dp2 overlap": (2, OVERLAP, {"micro_batch_size": 1}),
    "tp2 sp": (2, LAYOUTS["tp2_sp"], {"micro_batch_size": 2}),
    "tp2 sp recompute": (2, LAYOUTS["tp2_sp"], {"micro_batch_size": 2, **FULL}),
    "pp2": (2, LAYOUTS["pp2"], {"micro_batch_size": 2}),
    "pp2 interleaved": (2, LAYOUTS["pp2_vpp"], {"micro_batch_size": 1}),
    "tp2 pp2": (4, LAYOUTS["tp2_pp2"], {"micro_batch_size": 2}),
    "tp2 dp2": (4, LAYOUTS["tp2_sp"], {"micro_batch_size": 2}),
}
"""Ranks, parallel options, training options."""
QUICK = ["tp1 recompute", "dp2 accumulating", "tp2 sp", "pp2 interleaved"]


def run_packed(folder: str, reference: str, layout: dict, training: dict) -> dict[str, Any]:
    run = make_run(folder, layout, training=training, packed=True)
    results = take_steps(run, STEPS)
    weights, expected = local_weights(run), load_file(reference)
    far = max(
        (weights[slot.unit, slot.local_name] - local_slice(expected[slot.hf_name], slot, run.placement)).abs().max()
        for slot in parameter_slots(run.wrapped.modules)
    )
    return {
        "losses": [loss for loss, _ in results],
        "norms": [norm for _, norm in results],
        "far": float(far),
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float], list[float], str]:
    """The model's folder; losses and norms of the plain loop, and the file with its weights."""
    # Rotary angles are relative: an offset of a whole example would not show here, an attention across examples does.
    folder = make_llama(tmp_path_factory.mktemp("packing") / "model", "llama3_rope", **TINY)
    losses, norms, weights = plain_training(str(folder), toy_plan(str(folder), HFTConfig()), steps=STEPS, packed=True)
    save_file(weights, Path(folder) / "after.safetensors")
    return str(folder), losses, norms, str(folder / "after.safetensors")


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_losses_gradients_and_weights_equal_those_of_the_examples_on_their_own(ranks, reference, case):
    world_size, layout, training = CASES[case]
    folder, losses, norms, weights = reference
    values = ranks(world_size).run(run_packed, folder=folder, reference=weights, layout=layout, training=training)
    last_stages = [value["losses"] for value in values if value["losses"][0] is not None]
    assert last_stages
    for seen in last_stages:
        assert seen == pytest.approx(losses, rel=TOLERANCE)
    for value in values:
        assert value["norms"] == pytest.approx(norms, rel=TOLERANCE)
        assert value["far"] < 2e-5


def test_the_steps_of_this_test_hold_packs_of_several_examples_and_reach_into_a_second_epoch() -> None:
    samples = toy_samples(packed=True)
    drawn = [samples.sample(position) for position in range(8 * STEPS)]
    assert sum(map(len, drawn)) > 2 * len(drawn)
    assert {len(sample) for sample in drawn} >= {1, 2, 3}
    assert samples.epoch_starts(1)[1] < 8 * STEPS
