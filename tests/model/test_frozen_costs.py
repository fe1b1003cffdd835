"""Savings of freezing in a row-parallel matrix and in a whole step, counted."""

import itertools
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.model.linear import RowParallel
from hft_megatron.parallel.groups import start_groups
from tests.support.models import LAYOUTS, make_llama
from tests.support.toy_training import GLOBAL_BATCH, TINY, make_run, take_steps, toy_plan
from tests.support.work_account import Account

WORLD_SIZE = {"tp1": 1, "tp2": 2, "tp2_sp": 2}
SEQUENCE, BATCH, INPUT, OUTPUT = 6, 2, 12, 10


def run_row_parallel(layout: dict[str, Any]) -> list[dict[str, Any]]:
    """One pass of o_proj's and down_proj's module for every (weight trains, input trains)."""
    parallel = ParallelConfig(**layout)
    placement = start_groups(parallel, num_layers=2, seed=1)
    config = ModelParallelConfig(
        tensor_model_parallel_size=placement.tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        perform_initialization=False,
    )
    rows = []
    for trains, input_trains in itertools.product((True, False), repeat=2):
        linear = RowParallel(
            INPUT,
            OUTPUT,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=placement.groups.tp,
        )
        torch.nn.init.normal_(linear.weight)
        linear.weight.requires_grad = trains
        hidden = torch.randn(SEQUENCE, BATCH, INPUT // placement.tensor_size, requires_grad=input_trains)
        account = Account()
        with account.watching():
            output, _ = linear(hidden)
            kept = account.kept_besides(linear.weight)
            account.take()
            if output.requires_grad:
                output.sum().backward()
        rows.append(
            {
                "kept": kept,
                "products": account.take().count("product"),
                "gradients": [linear.weight.grad is not None, hidden.grad is not None],
            }
        )
    return rows


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_a_frozen_row_parallel_matrix_keeps_no_input_and_computes_no_weight_gradient(ranks, layout):
    shard = [SEQUENCE, BATCH, INPUT // WORLD_SIZE[layout]]
    for rows in ranks(WORLD_SIZE[layout]).run(run_row_parallel, layout=LAYOUTS[layout]):
        assert rows == [
            {"kept": [shard], "products": 2, "gradients": [True, True]},
            {"kept": [shard], "products": 1, "gradients": [True, False]},
            {"kept": [], "products": 1, "gradients": [False, True]},
            {"kept": [], "products": 0, "gradients": [False, False]},
        ]


def run_counting_products(folder: str, layout: dict[str, Any], ratio: float, hft: dict[str, Any]) -> int:
    """Matrix products of one step of two micro-batches on this rank."""
    run = make_run(folder, layout, ratio=ratio, training={"micro_batch_size": GLOBAL_BATCH // 2}, hft=hft)
    with Account() as account:
        take_steps(run, 1)
    return account.events.count("product")


@pytest.mark.parametrize("layout", ["tp1", "tp2_sp"])
def test_a_step_computes_no_weight_gradient_of_any_frozen_matrix(ranks, tmp_path, layout):
    folder = str(make_llama(tmp_path / "model", **TINY))
    plan = toy_plan(folder, HFTConfig(hft_freeze_head=True))
    frozen = [unit for unit in plan.units if not plan.trains(unit.name)]
    matrices = sum(unit.category in ("attention", "feed_forward", "lm_head") for unit in frozen)
    assert matrices == 15
    pool = ranks(WORLD_SIZE[layout])
    full, halved = (
        pool.run(run_counting_products, folder=folder, layout=LAYOUTS[layout], ratio=ratio, hft=options)
        for ratio, options in ((1.0, {}), (0.5, {"hft_freeze_head": True}))
    )
    assert [more - less for more, less in zip(full, halved, strict=True)] == [2 * matrices] * WORLD_SIZE[layout]
