"""A switch of rounds inside the process: what trains, what rests, what is carried, and what is freed."""

import gc
from typing import Any

import pytest
import torch

from hft_megatron.model.parameters import parameter_slots
from hft_megatron.training.run import Run
from tests.support.models import LAYOUTS, make_llama
from tests.support.ranks import RankPools
from tests.support.toy_training import TINY, local_weights, make_run, take_steps

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
EVERY_TWO = {"hft_round_interval": "2"}
LAYOUT_CASES: dict[str, tuple[int, str, dict[str, Any], bool]] = {
    "tp1": (1, "gqa", {}, False),
    "dp2 overlap": (2, "gqa", OVERLAP, False),
    "dp2 bf16": (2, "tied", {}, True),
    "tp2 sp": (2, "gqa", LAYOUTS["tp2_sp"], False),
    "pp2 vpp overlap dp2": (4, "gqa", LAYOUTS["pp2_vpp"] | OVERLAP, False),
    "pp2 dp2 tied bf16": (4, "tied", LAYOUTS["pp2"], True),
}
"""Ranks, model variant, parallel options, bf16."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rounds")
    return {variant: str(make_llama(folder / variant, variant, **TINY)) for variant in ("gqa", "tied")}


def start(folder: str, layout: dict[str, Any], bf16: bool = False, **hft: Any) -> Run:
    training = {"micro_batch_size": 2, "bf16": bf16}
    return make_run(folder, layout, training=training, optimizer={"lr_warmup_iters": 0}, hft=EVERY_TWO | hft)


def run_rounds(folder: str, layout: dict[str, Any], bf16: bool, **hft: Any) -> dict[str, Any]:
    """Three rounds of two steps; per round what moved although it rests, and what trains but stood still."""
    run = start(folder, layout, bf16, **hft)
    wrong, losses, trained = [], [], []
    for _ in range(3):
        before = local_weights(run)
        losses += take_steps(run, 2)
        after = local_weights(run)
        plan = run.wrapped.plan
        trained.append(sorted(plan.training))
        for key, value in before.items():
            moved = not torch.equal(value, after[key])
            if moved != plan.trains(key[0]):
                wrong.append((run.state.round, *key))
    return {"wrong": wrong, "losses": losses, "trained": trained, "round": run.state.round}


@pytest.mark.parametrize("moments", ["reset", "carry"])
@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_every_round_moves_what_its_plan_trains_and_nothing_else(
    case: str, moments: str, ranks: RankPools, folders: dict[str, str]
) -> None:
    world_size, variant, layout, bf16 = LAYOUT_CASES[case]
    results = ranks(world_size).run(run_rounds, folder=folders[variant], layout=layout, bf16=bf16, hft_moments=moments)
    for result in results:
        assert result["wrong"] == []
        assert result["round"] == 2
        assert len({tuple(names) for names in result["trained"]}) == 3
