"""What rests costs nothing and stays as it is: bits, buckets, bytes on the wire and bytes of state."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.optimizer import wrapping
from hft_megatron.training.run import Run
from hft_megatron.training.step import train_step
from tests.support.models import LAYOUTS, make_llama
from tests.support.tiers import quick
from tests.support.toy_training import local_weights, make_run
from tests.support.wire import sent_bytes

STEPS = 3
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SMALL_BUCKETS = {"ddp_bucket_size": 2000}
UNEVEN = {"hidden_size": 40, "intermediate_size": 56, "vocab_size": 97}
"""No parameter's size is a multiple of 64 or 128, so that every rule of padding shows in the sum."""
DECAY_ALONE_SHOWS = {"lr": 0.05, "lr_warmup_iters": 0, "weight_decay": 0.1}
"""Rows of tokens that never come have no gradient: their decay must be more than bf16 rounds away."""

Case = tuple[int, str, float, dict[str, Any], bool]
CASES: dict[str, Case] = {
    "tp1": (1, "gqa", 0.5, {}, False),
    "dp2": (2, "gqa", 0.5, {}, False),
    "dp2 full": (2, "gqa", 1.0, {}, False),
    "dp2 bf16": (2, "gqa", 0.5, {}, True),
    "dp2 overlap": (2, "gqa", 0.5, OVERLAP, False),
    "dp2 overlap small buckets": (2, "gqa", 0.5, OVERLAP | SMALL_BUCKETS, False),
    "dp2 overlap small buckets bf16": (2, "tied", 0.5, OVERLAP | SMALL_BUCKETS, True),
    "dp2 overlap small buckets full": (2, "gqa", 1.0, OVERLAP | SMALL_BUCKETS, False),
    "tp2 sp": (2, "gqa", 0.5, LAYOUTS["tp2_sp"], False),
    "pp2 dp2": (4, "gqa", 0.5, LAYOUTS["pp2"], False),
    "pp2 dp2 overlap tied": (4, "tied", 0.5, LAYOUTS["pp2"] | OVERLAP | SMALL_BUCKETS, False),
    "pp2 dp2 interleaved overlap": (4, "gqa", 0.5, LAYOUTS["pp2_vpp"] | OVERLAP | SMALL_BUCKETS, False),
    "tp2 dp2": (4, "gqa", 0.5, LAYOUTS["tp2_sp"], True),
    "tp2 dp2 overlap": (4, "gqa", 0.5, LAYOUTS["tp2_sp"] | OVERLAP | SMALL_BUCKETS, False),
    "tp2 dp2 overlap full": (4, "gqa", 1.0, LAYOUTS["tp2_sp"] | OVERLAP | SMALL_BUCKETS, False),
}
"""Ranks, model variant, ratio, parallel options, bf16."""
QUICK = ["tp1", "dp2", "dp2 full", "dp2 overlap small buckets bf16", "tp2 sp", "pp2 dp2 interleaved overlap"]


def leftovers(slot: ParameterSlot, run: Run) -> list[str]:
    """Whatever a resting weight still costs."""
    weight, shards = slot.parameter, run.wrapped.shards
    names = ("main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad")
    found = [name for name in names if hasattr(weight, name)]
    found += ["requires_grad"] if weight.requires_grad else []
    found += ["grad"] if weight.grad is not None else []
    found += ["a range in the optimizer"] if weight in shards.model_param_group_index_map else []
    buckets = [bucket for buffer in shards.buffers for bucket in buffer.buckets]
    found += ["a bucket"] if any(weight in bucket.params for bucket in buckets) else []
    memory = weight.untyped_storage().data_ptr()
    buffers = [tensor for buffer in shards.buffers for tensor in (buffer.param_data, buffer.grad_data)]
    found += ["a place in a buffer"] if any(memory == b.untyped_storage().data_ptr() for b in buffers) else []
    return found


def padded_rows(slot: ParameterSlot, run: Run) -> torch.Tensor:
    """The rows of a vocabulary matrix on this rank that only pad it."""
    first = run.placement.tensor_rank * slot.parameter.size(0)
    return slot.parameter.detach()[max(0, run.wrapped.modules[0].shape.vocab_size - first) :]


def run_audit(folder: str, ratio: float, layout: dict, bf16: bool) -> dict[str, Any]:
    training = {"micro_batch_size": 2, "bf16": bf16}
    run = make_run(folder, layout, ratio=ratio, training=training, optimizer=DECAY_ALONE_SHOWS)
    plan, shards, slots = run.wrapped.plan, run.wrapped.shards, list(parameter_slots(run.wrapped.modules))
    before = {(slot.unit, slot.local_name): slot.parameter.detach().clone() for slot in slots}
    wire, results = [], []
    for _ in range(STEPS):
        with sent_bytes() as counts:
            results.append(train_step(run))
        wire.append([counts["reduce_scatter"], counts["all_gather"]])
        run.learning_rate.advance()
        run.advance()
    after = local_weights(run)
    same = {key: torch.equal(before[key], after[key]) for key in before}
    resting = [slot for slot in slots if not plan.trains(slot.unit)]
    trained = [slot for slot in slots if plan.trains(slot.unit)]
    state_bytes = torch.tensor(shards.master_bytes + shards.moment_bytes)
    dist.all_reduce(state_bytes, group=run.placement.groups.dp)
    return {
        "resting": len(resting),
        "changed while resting": [slot.hf_name for slot in resting if not same[slot.unit, slot.local_name]],
        "unchanged while training": [slot.hf_name for slot in trained if same[slot.unit, slot.local_name]],
        "leftovers": {slot.hf_name: found for slot in resting if (found := leftovers(slot, run))},
        "kept gradients": [slot.hf_name for slot in trained if slot.parameter.grad is not None],
        "padding": {slot.hf_name: padded_rows(slot, run).abs().sum(1).tolist() for slot in slots if slot.is_vocab},
        "wire": wire,
        "data_size": run.placement.data_size,
        "reported": [[result.reduce_scatter_bytes, result.all_gather_bytes] for result in results],
        "gradient bytes": shards.gradient_bytes,
        "times": [result.times.sections | {"other": result.times.other} for result in results],
        "state bytes": shards.master_bytes + shards.moment_bytes,
        "state bytes of all replicas": int(state_bytes),
        "training parameters": sum(slot.parameter.numel() for slot in trained),
    }


@pytest.fixture(scope="module")
def audits(ranks, tmp_path_factory):
    """``audits(case)``: every rank's audit after ``STEPS`` steps with weight decay 0.1; each case runs once."""
    root, done = tmp_path_factory.mktemp("audit"), {}

    def audit(case: str) -> list[dict[str, Any]]:
        if case not in done:
            world_size, variant, ratio, layout, bf16 = CASES[case]
            folder = root / variant
            if not folder.exists():
                make_llama(folder, variant, **UNEVEN)
            done[case] = ranks(world_size).run(run_audit, folder=str(folder), ratio=ratio, layout=layout, bf16=bf16)
        return done[case]

    return audit


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_resting_shards_are_bit_identical_and_every_training_shard_changed_on_every_rank(audits, case):
    ratio = CASES[case][2]
    for audit in audits(case):
        assert (audit["resting"] > 0) == (ratio < 1)
        assert not audit["changed while resting"]
        assert not audit["unchanged while training"]


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_a_resting_weight_has_no_gradient_no_bucket_no_master_and_no_optimizer_state(audits, case):
    for audit in audits(case):
        assert audit["leftovers"] == {}
        assert audit["kept gradients"] == []


def test_rows_that_pad_the_vocabulary_stay_zero(audits):
    first, second = audits("tp2 sp")
    assert first["padding"] == {"model.embed_tokens.weight": [], "lm_head.weight": []}
    assert second["padding"] == {"model.embed_tokens.weight": [0.0], "lm_head.weight": [0.0]}


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_the_metrics_are_the_bytes_on_the_wire_in_every_step(audits, case):
    """How many there must be, test_rank_costs.py checks by formula."""
    for audit in audits(case):
        assert audit["reported"] == audit["wire"]
        assert (audit["wire"][0][0] > 0) == (audit["data_size"] > 1)


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_times_of_a_step_are_disjoint_and_waits_are_those_of_data_parallel_ranks(audits, case):
    for audit in audits(case):
        for times in audit["times"]:
            assert all(times[name] > 0 for name in ("forward", "backward", "optimizer", "other"))
            assert (times["reduce-scatter wait"] > 0) == (audit["data_size"] > 1)
            assert (times["all-gather wait"] > 0) == (audit["data_size"] > 1)


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_optimizer_state_is_8_or_12_bytes_per_training_parameter_over_the_data_parallel_ranks(audits, case):
    per_parameter = 12 if CASES[case][4] else 8
    for audit in audits(case):
        assert audit["state bytes of all replicas"] == per_parameter * audit["training parameters"]
        assert audit["state bytes"] <= per_parameter * audit["gradient bytes"] / 4 / audit["data_size"]


def test_the_half_plan_sends_about_half_of_what_the_full_plan_sends_outside_the_embeddings(audits):
    half, full = audits("dp2")[0], audits("dp2 full")[0]
    vocabulary = 2 * UNEVEN["vocab_size"] * UNEVEN["hidden_size"]
    share = (half["gradient bytes"] / 4 - vocabulary) / (full["gradient bytes"] / 4 - vocabulary)
    assert 0.4 < share < 0.6


def run_with_flags_that_differ_from_the_plan(folder: str, rests: bool) -> str:
    """The refusal when one unit's flag says the opposite of the plan (``rests``: the unit rests by the plan)."""

    def apply_wrongly(slots, plan):
        original(slots, plan)
        wrong = next(slot for slot in slots if plan.trains(slot.unit) != rests)
        wrong.parameter.requires_grad = rests

    original = wrapping.apply_plan
    with patch.object(wrapping, "apply_plan", apply_wrongly):
        try:
            make_run(folder, {})
        except AssertionError as refusal:
            return str(refusal)
    return "no refusal"


@pytest.mark.parametrize(
    ("rests", "refusal"), [(True, "resting units in gradient buckets"), (False, "training units in no gradient bucket")]
)
def test_the_optimizer_refuses_buckets_that_do_not_match_the_plan(ranks, tmp_path, rests, refusal):
    folder = str(make_llama(tmp_path / "model", **UNEVEN))
    for answer in ranks(1).run(run_with_flags_that_differ_from_the_plan, folder=folder, rests=rests):
        assert answer.startswith(refusal)
