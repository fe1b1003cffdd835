"""Bytes are counted through borrowed functions, over rounds, and who else uses megatron-core keeps its own.

How many bytes there should be is checked in tests/trainer/test_run_matrix.py.
"""

from typing import Any

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer

from hft_megatron.config.hft import HFTConfig
from hft_megatron.conversion.load import load_weights
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.model.build import build_model
from hft_megatron.optimizer.wrapping import wrap
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.step import train_step
from hft_megatron.trainer.validation import validate
from tests.support.models import make_llama
from tests.support.probe import costs_by_formula, live_costs
from tests.support.toy_training import TINY, make_run, take_steps, toy_plan
from tests.support.wire import sent_bytes

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
BORROWED = ("_ParamAndGradBucketGroup", "_coalescing_manager", "dist_all_gather_func", "dist_reduce_scatter_func")


def borrowed() -> list[Any]:
    return [getattr(param_and_grad_buffer, name) for name in BORROWED]


def sent(run: Run) -> list[int]:
    """Bytes passed to both collectives in one step."""
    result = train_step(run)
    return [result.reduce_scatter_bytes, result.all_gather_bytes]


def expected(run: Run) -> list[int]:
    shape = run.wrapped.modules[0].shape
    model = CostModel(shape=shape, parallel=run.config.parallel, world_size=run.placement.world_size, bf16=False)
    costs = model.stage_costs(run.wrapped.plan.trains, 0)[run.placement.data_rank]
    return [costs.reduce_scatter_bytes, costs.all_gather_bytes]


def run_with_gradients(folder: str, fp32_gradients: bool) -> dict[str, Any]:
    """Of two steps with bf16 weights: what is held and sent, in fact and by formula, and what was learned."""
    training = {"bf16": True, "accumulate_allreduce_grads_in_fp32": fp32_gradients}
    run = make_run(
        folder, OVERLAP, training=training, optimizer={"lr_warmup_iters": 0}, hft={"hft_round_interval": "1"}
    )
    with sent_bytes() as counts:
        steps = take_steps(run, 2)
    formula, held = costs_by_formula(run), live_costs(run)
    shards = run.wrapped.shards
    copies = [main.grad for group in shards.optimizer.param_groups for main in group["params"]]
    return {
        "steps": steps,
        "held": held,
        "held by formula": {name: getattr(formula, name) for name in held},
        "reduced": counts["reduce_scatter"],
        "copied": sum(grad.nbytes for grad in copies),
        "masters": shards.master_bytes,
        "dtypes": sorted({str(buffer.grad_data.dtype) for buffer in shards.buffers}),
    }


@pytest.mark.engine
def test_gradients_in_bf16_are_half_of_what_is_held_and_sent_and_train_as_well(ranks, tmp_path):
    folder = str(make_llama(tmp_path / "model", **TINY))
    fp32, bf16 = (ranks(2).run(run_with_gradients, folder=folder, fp32_gradients=kept) for kept in (True, False))
    for full, half in zip(fp32, bf16, strict=True):
        assert (full["dtypes"], half["dtypes"]) == (["torch.float32"], ["torch.bfloat16"])
        assert half["held"] == half["held by formula"]
        assert full["held"] == full["held by formula"]
        assert 2 * half["held"]["gradient_bytes"] == full["held"]["gradient_bytes"] > 0
        assert 2 * half["reduced"] == full["reduced"] > 0
        assert half["held"]["optimizer_bytes"] == full["held"]["optimizer_bytes"]
        assert half["copied"] == half["masters"], "the optimizer's own are fp32"
        assert half["steps"] != full["steps"]
        for step, other in zip(half["steps"], full["steps"], strict=True):
            assert step == pytest.approx(other, rel=0.02)


def run_rounds(folder: str) -> dict[str, Any]:
    before = borrowed()
    run = make_run(folder, OVERLAP)
    answers: dict[str, Any] = {"steps": [sent(run)], "expected": [expected(run)]}
    with torch.no_grad():
        validate(run)
    answers["after a validation"] = sent(run)
    with run.wrapped.gathered_parameters():  # what a switch of rounds does to the old wrapper
        pass
    answers["flushed"] = run.wrapped.traffic.take_bytes()
    config, shape = run.config, run.wrapped.modules[0].shape
    chunks = build_model(shape, config.parallel, config.training, placement=run.placement, dtype=torch.float32)
    load_weights(folder, chunks, shape, run.placement)
    run.wrapped = wrap(
        chunks,
        toy_plan(folder, HFTConfig(hft_ratio=1.0)),
        config.parallel,
        config.optimizer,
        bf16=False,
        traffic=run.wrapped.traffic,
    )
    answers["steps"] += [sent(run), sent(run)]
    answers["expected"] += [expected(run)] * 2
    answers["given back"] = [one is other for one, other in zip(before, borrowed(), strict=True)]
    return answers


def test_traffic_is_counted_by_step_and_over_rounds_and_the_borrowed_functions_are_given_back(ranks, tmp_path):
    folder = str(make_llama(tmp_path / "model", **TINY))
    for answers in ranks(2).run(run_rounds, folder=folder):
        half, full, again = answers["steps"]
        assert [half, full, again] == answers["expected"]
        assert full == again
        assert 0 < half[0] < full[0]
        # The gather that the validation forced is the one that the next step would have made.
        assert answers["after a validation"] == half
        assert answers["flushed"] == [0, half[1]]
        assert answers["given back"] == [True] * len(BORROWED)
