"""The optimizer holds what the plan says: half of it, and no bucket with a frozen unit in it."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer import wrapping
from hft_megatron.optimizer.distributed import NonFiniteNorm
from hft_megatron.trainer.method import run_schedule
from hft_megatron.trainer.run import Run
from tests.support.models import make_llama
from tests.support.operator_calls import OperatorCalls
from tests.support.toy_training import TINY, local_weights, make_run, take_steps

UNEVEN = {"hidden_size": 40, "intermediate_size": 56, "vocab_size": 97}


def run_gradient_bytes(folder: str, ratio: float) -> int:
    return make_run(folder, {}, ratio=ratio).wrapped.shards.gradient_bytes


def test_the_half_plan_sends_about_half_of_what_the_full_plan_sends_outside_the_embeddings(ranks, tmp_path):
    folder = str(make_llama(tmp_path / "model", **UNEVEN))
    [half, full] = (ranks(2).run(run_gradient_bytes, folder=folder, ratio=ratio)[0] for ratio in (0.5, 1.0))
    vocabulary = 2 * UNEVEN["vocab_size"] * UNEVEN["hidden_size"]
    share = (half / 4 - vocabulary) / (full / 4 - vocabulary)
    assert 0.4 < share < 0.6


def run_with_flags_that_differ_from_the_plan(folder: str, is_frozen: bool) -> str:
    """The refusal when one unit's flag says the opposite of the plan (``is_frozen``: the plan freezes the unit)."""

    def apply_wrongly(slots, plan):
        original(slots, plan)
        wrong = next(slot for slot in slots if plan.trains(slot.unit) != is_frozen)
        wrong.parameter.requires_grad = is_frozen

    original = wrapping.apply_plan
    with patch.object(wrapping, "apply_plan", apply_wrongly):
        try:
            make_run(folder, {})
        except AssertionError as refusal:
            return str(refusal)
    return "no refusal"


@pytest.mark.parametrize(
    ("is_frozen", "refusal"),
    [(True, "frozen units in gradient buckets"), (False, "trainable units in no gradient bucket")],
)
def test_the_optimizer_refuses_buckets_that_do_not_match_the_plan(ranks, tmp_path, is_frozen, refusal):
    folder = str(make_llama(tmp_path / "model", **UNEVEN))
    for answer in ranks(1).run(run_with_flags_that_differ_from_the_plan, folder=folder, is_frozen=is_frozen):
        assert answer.startswith(refusal)


def run_with_rates_of_embedding_and_head(folder: str, layout: dict[str, Any]) -> dict[str, list[float]]:
    """The rate that every unit of this rank is trained with in each of three steps, and what is reported of both."""
    rates = {"lr": 0.5, "min_lr": 0.1, "lr_warmup_iters": 0, "lr_decay_style": "linear", "weight_decay": 0.0}
    run = make_run(
        folder, layout, ratio=1.0, training={"train_iters": 4}, optimizer=rates | {"decoupled_lr": 0.04, **FLOOR}
    )
    seen: dict[str, list[float]] = {"reported": [], "reported of both": []}
    for _ in range(3):
        adamw = run.wrapped.shards.optimizer
        rate_of = {id(main): group["lr"] for group in adamw.param_groups for main in group["params"]}
        for slot in parameter_slots(run.wrapped.modules):
            _, main = run.wrapped.shards._main_param(slot.parameter)
            seen.setdefault(slot.unit, []).append(rate_of[id(main)])
        take_steps(run, 1)
        seen["reported"].append(run.learning_rate.last)
        seen["reported of both"].append(run.learning_rate.last_decoupled)
    return seen


FLOOR = {"decoupled_min_lr": 0.02}


@pytest.mark.engine
@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_embedding_and_head_have_rates_of_their_own_tied_or_not(ranks, tmp_path, variant):
    folder = str(make_llama(tmp_path / "model", variant, **TINY))
    first, last = ranks(2).run(
        run_with_rates_of_embedding_and_head, folder=folder, layout={"pipeline_model_parallel_size": 2}
    )
    own = {"model.embed_tokens", "lm_head"}
    for seen in (first, last):
        assert seen.pop("reported") == pytest.approx([0.5, 0.4, 0.3])
        assert seen.pop("reported of both") == pytest.approx([0.04, 0.035, 0.03])
        for unit, found in seen.items():
            assert found == pytest.approx([0.04, 0.035, 0.03] if unit in own else [0.5, 0.4, 0.3]), unit
    assert {unit for seen in (first, last) for unit in seen} >= (own if variant == "gqa" else {"model.embed_tokens"})
    assert own & last.keys()


def accumulate(run: Run) -> None:
    """Gradients of one step, reduced."""
    run.wrapped.zero_gradients()
    batch = run.batches.step(run.state.consumed_samples)
    run_schedule(run.objective.forward_step, run.wrapped.chunks, batch, forward_only=False)


@contextlib.contextmanager
def default_adamw() -> Iterator[None]:
    """Within it, optimizers are built with the AdamW that torch takes where nothing is said."""

    def build(kind: type[torch.optim.AdamW], params: Any, *, adam_w_mode: bool, **options: Any) -> torch.optim.AdamW:
        return kind(params, **options)

    with patch.object(wrapping, "_torch_adamw", build):
        yield


def run_norms(folder: str) -> dict[str, Any]:
    """The host's reads in the reduction of gradients and in a step, and the norm beside megatron-core's own."""
    run = make_run(folder, {"overlap_grad_reduce": True, "ddp_bucket_size": 2000})
    take_steps(run, 1)
    with OperatorCalls() as reducing:
        accumulate(run)
    shards = run.wrapped.shards
    shards.prepare_grads()
    own = DistributedOptimizer.get_grad_norm(shards)
    with OperatorCalls() as stepping:
        _, norm, _ = run.wrapped.optimizer.step()
    return {"reducing": reducing.reads, "stepping": stepping.reads, "norm": norm, "own": own}


def test_the_host_reads_one_number_in_a_step_however_many_tensors_there_are(ranks, tmp_path):
    folders = [str(make_llama(tmp_path / str(layers), **TINY, num_hidden_layers=layers)) for layers in (2, 4)]
    small, large = (ranks(2).run(run_norms, folder=folder) for folder in folders)
    for few, many in zip(small, large, strict=True):
        assert few["reducing"] == many["reducing"]
        assert few["stepping"] == many["stepping"] == {"item": 1}
        assert many["norm"] == pytest.approx(many["own"], rel=1e-6)
    assert large[0]["norm"] == large[1]["norm"] > 0


def run_rounds(folder: str, fused: bool) -> dict[str, Any]:
    """Steps over rounds whose moments are carried: what they measured, which AdamW it was, and where its counts are."""
    hft = {"hft_round_interval": "2", "hft_moments": "carry"}
    with contextlib.nullcontext() if fused else default_adamw():
        run = make_run(folder, {}, hft=hft, optimizer={"lr_warmup_iters": 0})
        steps = take_steps(run, 6)
    adamw = run.wrapped.optimizer.optimizer
    counts = [state["step"] for state in adamw.state.values()]
    return {
        "steps": steps,
        "fused": [group["fused"] is True for group in adamw.param_groups],
        "counts": sorted({count.item() for count in counts}),
        "own counts": len({count.data_ptr() for count in counts}) == len(counts),
    }


def test_the_fused_adamw_counts_and_trains_like_the_default_one(ranks, tmp_path):
    folder = str(make_llama(tmp_path / "model", **TINY))
    [plain], [fused] = (ranks(1).run(run_rounds, folder=folder, fused=fused) for fused in (False, True))
    assert (set(plain["fused"]), set(fused["fused"])) == ({False}, {True})
    assert fused["own counts"]
    assert fused["counts"] == plain["counts"]
    assert len(fused["counts"]) > 1, "else every unit trains in all rounds, or no moments were carried"
    for one, other in zip(fused["steps"], plain["steps"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def run_with_an_undefined_gradient(folder: str, value: float) -> dict[str, Any]:
    run = make_run(folder, {})
    take_steps(run, 1)
    before = local_weights(run)
    accumulate(run)
    held = run.wrapped.shards.model_param_gbuf_map
    slot = next(
        slot for slot in parameter_slots(run.wrapped.modules) if slot.unit.endswith("norm") and slot.parameter in held
    )
    if run.placement.rank == 1:
        slot.parameter.main_grad.fill_(value)
    with pytest.raises(NonFiniteNorm) as caught:
        run.wrapped.optimizer.step()
    after = local_weights(run)
    return {
        "said": str(caught.value),
        "unit": slot.unit,
        "units": run.wrapped.shards.nonfinite_gradients(),
        "kept": all(torch.equal(before[name], after[name]) for name in before),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_gradient_that_is_no_number_is_found_by_all_ranks_and_changes_no_weight(ranks, tmp_path, value):
    folder = str(make_llama(tmp_path / "model", **TINY))
    first, second = ranks(2).run(run_with_an_undefined_gradient, folder=folder, value=value)
    assert first["said"] == second["said"] == f"the norm of the gradients is {'nan' if value != value else 'inf'}"
    assert first["kept"]
    assert second["kept"]
    assert first["units"] == []
    assert second["units"] == ([] if value == 3e38 else [second["unit"]])
