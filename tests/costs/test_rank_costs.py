"""Costs by formula where they follow without it; tests/trainer/test_run_matrix.py has live ones, to the byte."""

from dataclasses import astuple, replace
from typing import Any

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.costs.rank_costs import CostModel

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


def test_gradients_in_bf16_are_2_bytes_where_they_are_held_and_sent_and_change_nothing_else():
    fp32, bf16 = (
        costs(world_size=2, fp32_gradients=kept).stage_costs(lambda unit: True, 0)[0] for kept in (True, False)
    )
    assert bf16 == replace(
        fp32, gradient_bytes=fp32.gradient_bytes // 2, reduce_scatter_bytes=fp32.reduce_scatter_bytes // 2
    )
    assert costs(bf16=False, fp32_gradients=False).stage_costs(lambda unit: True, 0) == costs(bf16=False).stage_costs(
        lambda unit: True, 0
    ), "beside fp32 weights there are only fp32 ones"


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
