"""Frozen embeddings and first layers, with activations recomputed and without."""

from functools import lru_cache
from typing import Any

import pytest
import torch

from hft_megatron.config.hft import HFTConfig
from hft_megatron.trainer.run import Run
from tests.support.models import LAYOUTS, make_llama
from tests.support.toy_training import TINY, local_weights, make_run, take_steps, toy_plan

EMBEDDING, FIRST, SECOND = "model.embed_tokens", "model.layers.0.*", "model.layers.1.*"
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective"}

Case = tuple[int, str, int, dict[str, Any], list[str], list[int]]
CASES: dict[str, Case] = {
    # Layers (from 1) whose input requires a gradient: by autograd's own rule, from above the first weight that trains.
    "embedding and a layer": (1, "tp1", 4, {}, [EMBEDDING, FIRST], [3, 4]),
    "embedding, sequence parallel": (2, "tp2_sp", 4, {}, [EMBEDDING, FIRST], [3, 4]),
    "first chunk": (2, "pp2_vpp", 4, {}, [EMBEDDING, FIRST], [2, 3, 4]),
    # Recomputed layers train only if their input requires a gradient, so the lowest inputs do.
    "embedding, uniform": (1, "tp1", 1, UNIFORM, [EMBEDDING], [1, 2, 3, 4]),
    "embedding, block": (1, "tp1", 1, BLOCK, [EMBEDDING], [1, 2, 3, 4]),
    "all that is recomputed, block": (1, "tp1", 4, BLOCK, [EMBEDDING, FIRST, SECOND], [4]),
    "embedding, uniform, sequence parallel": (2, "tp2_sp", 1, UNIFORM, [EMBEDDING, FIRST], [1, 2, 3, 4]),
}
"""Ranks, layout, micro-batch size (of 1 megatron-core makes the hidden state anew), recomputation, patterns of what
is frozen besides the draw, layers whose input requires a gradient."""


def watch_inputs(run: Run) -> set[int]:
    """Fills with the numbers of layers whose input requires a gradient as the forward pass enters the layer stack."""
    needing: set[int] = set()

    def note(layer: Any, inputs: Any, options: Any) -> None:
        # Inside a checkpointed pass gradients are off: what counts there is seen when it runs again.
        if torch.is_grad_enabled() and options["hidden_states"].requires_grad:
            needing.add(layer.layer_number)

    for chunk in run.wrapped.modules:
        for layer in chunk.decoder.layers:
            layer.register_forward_pre_hook(note, with_kwargs=True)
    return needing


def run_case(folder: str, layout: str, recompute: dict, hft: dict, micro_batch_size: int) -> dict[str, Any]:
    training = {"micro_batch_size": micro_batch_size, **recompute}
    options = {"lr_warmup_iters": 0, "weight_decay": 0.0}
    run = make_run(folder, LAYOUTS[layout], training=training, optimizer=options, hft=hft)
    needing = watch_inputs(run)
    before = local_weights(run)
    [(_, norm)] = take_steps(run, 1)
    after = local_weights(run)
    return {
        "needing": sorted(needing),
        "changed": [unit for unit, name in before if not torch.equal(before[unit, name], after[unit, name])],
        "units": [unit for unit, _ in before],
        "norm": norm,
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("bottom") / "model", **TINY))


@pytest.fixture(scope="session")
def norms(ranks, folder):
    """``norms(freeze)``: the first step's gradient norm where everything below requires gradients."""

    @lru_cache
    def norm(freeze: str) -> float:
        [answer] = ranks(1).run(
            run_case, folder=folder, layout="tp1", recompute={}, hft={"hft_freeze": freeze}, micro_batch_size=8
        )
        return answer["norm"]

    return norm


@pytest.mark.parametrize("case", CASES)
def test_all_that_trains_above_a_frozen_bottom_trains_and_input_gradients_stop_where_autograd_stops(
    ranks, folder, norms, case
):
    world_size, layout, micro_batch_size, recompute, frozen, needing = CASES[case]
    hft = {"hft_freeze": ",".join(frozen)}
    answers = ranks(world_size).run(
        run_case, folder=folder, layout=layout, recompute=recompute, hft=hft, micro_batch_size=micro_batch_size
    )
    assert sorted({layer for answer in answers for layer in answer["needing"]}) == needing
    plan = toy_plan(folder, HFTConfig(**hft))
    for answer in answers:
        assert answer["changed"] == [unit for unit in answer["units"] if plan.trains(unit)]
        assert answer["norm"] == pytest.approx(norms(hft["hft_freeze"]), rel=1e-4)
