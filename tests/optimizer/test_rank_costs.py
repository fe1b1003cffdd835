"""The costs of a plan by formula are those of the live optimizer, to the byte, on every rank of all layouts."""

from dataclasses import astuple, replace
from typing import Any

import pytest

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import ParallelConfig
from hft_megatron.model.parameter_names import chunk_parameters, chunk_places, local_elements
from hft_megatron.optimizer.rank_costs import CostModel, RankCosts
from hft_megatron.training.run import Run
from tests.support.models import LAYOUTS, make_llama
from tests.support.tiers import quick
from tests.support.toy_training import make_run, take_steps
from tests.support.wire import sent_bytes

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SMALL_BUCKETS = {"ddp_bucket_size": 2000}
UNEVEN = {"hidden_size": 40, "intermediate_size": 56, "vocab_size": 97}
"""No parameter's size is a multiple of 64 or 128, so that every rule of padding shows in the sum."""

LAST_STAGE_RESTS = "model.layers.2.*,model.layers.3.*,model.norm,lm_head"

CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any], bool]] = {
    "dp2": (2, "gqa", {}, {}, False),
    "dp2 bf16 in small buckets": (2, "tied", OVERLAP | SMALL_BUCKETS, {}, True),
    "dp2 overlapped in megatron-core's buckets": (2, "gqa", OVERLAP, {"hft_freeze_embedding": True}, True),
    "tp2": (2, "gqa", LAYOUTS["tp2_sp"], {}, True),
    "pp2 tied": (2, "tied", LAYOUTS["pp2"], {}, False),
    "pp2 with a stage that rests": (2, "gqa", LAYOUTS["pp2"], {"hft_freeze": LAST_STAGE_RESTS}, True),
    "pp2 dp2 tied, overlapped": (4, "tied", LAYOUTS["pp2"] | OVERLAP | SMALL_BUCKETS, {}, True),
    "pp2 dp2 interleaved": (4, "gqa", LAYOUTS["pp2_vpp"] | OVERLAP | SMALL_BUCKETS, {}, False),
    "pp2 dp2 tied, interleaved": (4, "tied", LAYOUTS["pp2_vpp"], {"hft_level": "model"}, True),
    "tp2 dp2": (4, "gqa", LAYOUTS["tp2_sp"] | OVERLAP | SMALL_BUCKETS, {"hft_level": "layer"}, False),
}
"""Ranks, model variant, parallel options, options of the method, bf16."""
QUICK = ["dp2 bf16 in small buckets", "pp2 with a stage that rests", "pp2 dp2 tied, overlapped", "pp2 dp2 interleaved"]


def live_costs(run: Run) -> RankCosts:
    """What this rank holds and sends in a step, read off the live tensors."""
    with sent_bytes() as sent:
        take_steps(run, 1)
    shards = run.wrapped.shards
    # A rank that owns nothing to train has megatron-core's stub, without buffers and groups.
    live = not shards.is_stub_optimizer
    masters = [main for group in shards.shard_fp32_from_float16_groups for main in group] if live else []
    moments = (
        [state[key] for state in shards.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")] if live else []
    )
    parameters = [parameter for module in run.wrapped.modules for parameter in module.parameters()]
    return RankCosts(
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        gradient_bytes=sum(buffer.grad_data.nbytes for buffer in shards.buffers) if live else 0,
        optimizer_bytes=sum(tensor.nbytes for tensor in [*masters, *moments]),
        reduce_scatter_bytes=sent["reduce_scatter"],
        all_gather_bytes=sent["all_gather"],
    )


def run_costs(folder: str, layout: dict[str, Any], hft: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Costs by formula, live costs, and the parameters of this rank by table and as they are."""
    run = make_run(folder, layout, hft=hft, training={"bf16": bf16})
    place, shape = run.placement, run.wrapped.modules[0].shape
    costs = CostModel(shape=shape, parallel=run.config.parallel, world_size=place.world_size, bf16=bf16)
    by_table = [
        [
            (name.local_name, local_elements(name, shape, tensor_size=place.tensor_size, vocab_multiple=1))
            for name in chunk_parameters(chunk, shape)
        ]
        for chunk in chunk_places(shape, run.config.parallel, place.pipeline_rank)
    ]
    return {
        "formula": astuple(costs.stage_costs(run.wrapped.plan.trains, place.pipeline_rank)[place.data_rank]),
        "live": astuple(live_costs(run)),
        "table": by_table,
        "named_parameters": [[(n, p.numel()) for n, p in m.named_parameters()] for m in run.wrapped.modules],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("costs")
    return {variant: str(make_llama(root / variant, variant, **UNEVEN)) for variant in ("gqa", "tied")}


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_costs_by_formula_are_live_ones_to_the_byte_and_parameters_come_in_the_order_of_registration(
    ranks, folders, case
):
    world_size, variant, layout, hft, bf16 = CASES[case]
    for found in ranks(world_size).run(run_costs, folder=folders[variant], layout=layout, hft=hft, bf16=bf16):
        assert found["formula"] == found["live"]
        assert found["table"] == found["named_parameters"]


SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=300,
    max_position_embeddings=128,
)


def costs(**changes: Any) -> CostModel:
    return replace(CostModel(shape=SHAPE, parallel=ParallelConfig(), world_size=1, bf16=True), **changes)


def test_full_fine_tuning_on_one_rank_holds_4_bytes_of_gradient_and_12_of_state_per_parameter_and_sends_nothing():
    [rank] = costs().stage_costs(lambda unit: True, 0)
    parameters = SHAPE.parameter_count()
    assert rank.trainable_parameters == parameters
    assert 4 * parameters <= rank.gradient_bytes < 4 * (parameters + 128)
    assert rank.optimizer_bytes == 12 * parameters
    assert (rank.reduce_scatter_bytes, rank.all_gather_bytes) == (0, 0)


def test_a_stage_where_everything_rests_costs_nothing():
    pipeline = ParallelConfig(pipeline_model_parallel_size=2)
    model = costs(parallel=pipeline, world_size=4)
    for rank in model.stage_costs(lambda unit: unit.startswith("model.layers.0."), 1):
        assert set(astuple(rank)) == {0}


def test_the_optimizer_bytes_of_all_data_parallel_ranks_add_up_to_one_replica_however_many_there_are():
    [alone] = costs().stage_costs(lambda unit: True, 0)
    for data_size in (2, 3, 96):
        parts = costs(world_size=data_size).stage_costs(lambda unit: True, 0)
        assert len(parts) == data_size
        assert sum(part.optimizer_bytes for part in parts) == alone.optimizer_bytes


def test_the_vocabulary_is_padded_to_a_multiple_of_the_option_times_the_tensor_size():
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    only_embedding = costs(parallel=parallel, world_size=4, vocab_multiple=128).stage_costs(
        lambda unit: unit == "model.embed_tokens", 0
    )
    assert only_embedding[0].trainable_parameters == 512 // 4 * SHAPE.hidden_size
