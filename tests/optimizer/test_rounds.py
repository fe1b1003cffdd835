"""A switch of rounds inside the process: what trains, what rests, what is carried, and what is freed."""

import gc
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer import rounds
from hft_megatron.training.loop import begin_round
from hft_megatron.training.run import Run
from tests.support.models import LAYOUTS, make_llama
from tests.support.plain_rounds import plain_rounds
from tests.support.ranks import RankPools
from tests.support.tiers import quick
from tests.support.toy_training import OPTIMIZER, TINY, local_weights, make_run, take_steps

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
EVERY_TWO = {"hft_round_interval": "2"}
STEPS = 8
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
    training = {"micro_batch_size": 2, "bf16": bf16, "train_iters": 51}
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


@pytest.mark.parametrize("case", quick(LAYOUT_CASES, ["dp2 bf16", "pp2 vpp overlap dp2"]))
def test_every_round_moves_what_its_plan_trains_and_nothing_else(
    case: str, ranks: RankPools, folders: dict[str, str]
) -> None:
    world_size, variant, layout, bf16 = LAYOUT_CASES[case]
    moments = "carry" if bf16 else "reset"
    results = ranks(world_size).run(run_rounds, folder=folders[variant], layout=layout, bf16=bf16, hft_moments=moments)
    for result in results:
        assert result["wrong"] == []
        assert result["round"] == 2
        assert len({tuple(names) for names in result["trained"]}) == 3


def run_masters_after_a_switch(folder: str, layout: dict[str, Any], moments: str) -> dict[str, int]:
    """How many elements of this rank's masters are not their weights in bf16, and how many are finer than bf16."""
    run = start(folder, layout, bf16=True, hft_moments=moments)
    take_steps(run, 2)
    begin_round(run, 1)
    shards, found = run.wrapped.shards, {"elements": 0, "wrong": 0, "finer": 0}
    for slot in parameter_slots(run.wrapped.modules):
        if slot.parameter in shards.model_param_gbuf_map:
            held = shards._get_model_param_range_map(slot.parameter)["param"]
            weight = slot.parameter.detach().view(-1)[held.start : held.end]
            _, master = shards._main_param(slot.parameter)
            found["elements"] += master.numel()
            found["wrong"] += int((master.bfloat16() != weight).sum())
            found["finer"] += int((master != weight.float()).sum())
    return found


@pytest.mark.parametrize("moments", ["reset", "carry"])
@pytest.mark.parametrize("case", ["dp2 bf16", "pp2 dp2 tied bf16"])
def test_bf16_masters_stay_with_their_weights_and_carried_ones_keep_all_their_digits(
    case: str, moments: str, ranks: RankPools, folders: dict[str, str]
) -> None:
    world_size, variant, layout, _ = LAYOUT_CASES[case]
    for found in ranks(world_size).run(
        run_masters_after_a_switch, folder=folders[variant], layout=layout, moments=moments
    ):
        assert found["wrong"] == 0
        assert found["elements"] > 0
        assert (found["finer"] > 0.1 * found["elements"]) == (moments == "carry")


MOMENTS = {
    "nothing": {"hft_moments": "reset"},
    "training": {"hft_moments": "carry"},
    "everything": {"hft_moments": "carry", "hft_resting_moments": "host"},
}
"""What the reference keeps at a switch, and the options for it."""
REFERENCE_LAYOUTS = {"tp1": (1, {}), "dp2 overlap": (2, OVERLAP), "tp2 pp2": (4, LAYOUTS["tp2_pp2"])}
TOLERANCE = 1e-5
"""Relative; measured below 1e-6."""


def run_constant_rate(folder: str, layout: dict[str, Any], **hft: Any) -> list[float | None]:
    optimizer = {"lr_decay_style": "constant", "lr_warmup_iters": 0, "min_lr": 0.0}
    run = make_run(folder, layout, training={"micro_batch_size": 4}, optimizer=optimizer, hft=EVERY_TWO | hft)
    return [loss for loss, _ in take_steps(run, STEPS)]


@pytest.fixture(scope="module")
def reference_losses(folders: dict[str, str]) -> dict[str, list[float]]:
    return {
        keeps: plain_rounds(folders["gqa"], steps=STEPS, interval=2, lr=OPTIMIZER.lr, keeps=keeps) for keeps in MOMENTS
    }


@pytest.mark.parametrize("keeps", MOMENTS)
@pytest.mark.parametrize("layout", quick(REFERENCE_LAYOUTS, ["dp2 overlap"]))
def test_losses_over_four_rounds_equal_plain_pytorch(
    layout: str, keeps: str, ranks: RankPools, folders: dict[str, str], reference_losses: dict[str, list[float]]
) -> None:
    world_size, options = REFERENCE_LAYOUTS[layout]
    results = ranks(world_size).run(run_constant_rate, folder=folders["gqa"], layout=options, **MOMENTS[keeps])
    assert results[-1] == pytest.approx(reference_losses[keeps], rel=TOLERANCE)


def test_what_is_kept_at_a_switch_shows_in_the_losses(reference_losses: dict[str, list[float]]) -> None:
    """Else the comparison above could not tell one kind of moments from another."""
    kinds = list(reference_losses.values())
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert kinds[first] != pytest.approx(kinds[second], rel=100 * TOLERANCE)


def living_bytes() -> int:
    """Memory of all tensors that something in this process still refers to."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run_many_switches(folder: str) -> dict[str, Any]:
    """Bytes alive after 2 and after 50 switches, and in the last one between the unwrapping and the wrapping."""
    run = start(folder, OVERLAP, hft_round_interval="1", hft_rotation="fixed")
    between, wrap = [], rounds.wrap

    def wrap_after_a_look(*args: Any, **options: Any) -> Any:
        between.append(living_bytes())
        return wrap(*args, **options)

    take_steps(run, 3)
    after = [living_bytes()]
    take_steps(run, 47)
    with patch.object(rounds, "wrap", wrap_after_a_look):
        take_steps(run, 1)
    after.append(living_bytes())
    assert run.state.round == 50
    state = run.wrapped.shards.moment_bytes + run.wrapped.shards.gradient_bytes
    return {"after": after, "between": between, "state": state}


@pytest.mark.slow
def test_fifty_switches_leave_memory_where_two_left_it(ranks: RankPools, folders: dict[str, str]) -> None:
    for result in ranks(2).run(run_many_switches, folder=folders["gqa"]):
        early, late = result["after"]
        # Batches differ in length by a few kilobytes; one buffer that stays behind has hundreds.
        assert late == pytest.approx(early, rel=0.01)
        # Before the next round's buffers are made, those of the last one and its moments are gone.
        (between,) = result["between"]
        assert late - between >= result["state"]
