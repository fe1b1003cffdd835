"""Bytes are counted through borrowed functions, over rounds, and who else uses megatron-core keeps its own.

How many bytes there should be is checked in tests/trainer/test_run_matrix.py.
"""

from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer

from hft_megatron.config.hft import HFTConfig
from hft_megatron.conversion.load import load_weights
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.model.build import build_model
from hft_megatron.optimizer.wrapping import wrap
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.step import train_step, validate
from tests.support.models import make_llama
from tests.support.toy_training import TINY, make_run, toy_plan

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
