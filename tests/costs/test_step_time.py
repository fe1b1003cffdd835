"""The time of a step by formula, against what follows by hand. Run: pytest tests/costs/test_step_time.py"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.flops import step_flops
from hft_megatron.costs.part_times import Device
from hft_megatron.costs.parts import parts_of
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.costs.rank_memory import MicroBatch
from hft_megatron.costs.step_time import StepTime, StepTimeModel

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=256,
    max_position_embeddings=128,
)
INFINITE = 1e30
INSTANT = Device(
    tflops=INFINITE,
    memory_bandwidth=INFINITE,
    node_bandwidth=INFINITE,
    network_bandwidth=INFINITE,
    devices_per_node=8,
)
"""A device on which nothing takes time: tests give a rate to what they look at."""
TOKENS = 128
HIDDEN_BYTES = 4 * TOKENS * SHAPE.hidden_size
"""Of a micro-batch's hidden states in fp32."""
UNIFORM = TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def everything(unit: str) -> bool:
    return True


def all_but(*names: str) -> Callable[[str], bool]:
    return lambda unit: not unit.endswith(names)


def model(world_size: int = 1, shape: ModelShape = SHAPE, micro_batches: int = 1, **changes: Any) -> StepTimeModel:
    """fp32, one sequence of 128 tokens in a micro-batch; ``changes`` are of layout, device and recomputation."""
    device = {name: changes.pop(name) for name in tuple(changes) if name in vars(INSTANT)}
    training = changes.pop("training", TrainingConfig())
    return StepTimeModel(
        costs=CostModel(shape=shape, parallel=ParallelConfig(**changes), world_size=world_size, bf16=False),
        training=training,
        micro_batch=MicroBatch(sequences=1, seq_length=TOKENS),
        micro_batches=micro_batches,
        device=replace(INSTANT, **device),
    )


def parts(step: StepTime) -> dict[str, float]:
    """Those that take time, if only on an instant device's scale."""
    return {name: seconds for name, seconds in vars(step).items() if seconds > 1e-15}


def test_the_products_of_a_step_take_its_flops_at_the_devices_rate_with_the_scores_that_attention_makes_again():
    for trains in (everything, all_but("q_proj", "down_proj"), all_but("embed_tokens", "0.self_attn.q_proj")):
        step = model(tflops=1e-6, micro_batches=3).of(trains)
        flops = step_flops(SHAPE, ParallelConfig(), TrainingConfig(), trains, micro_batch_tokens=TOKENS).actual
        forward_scores = SHAPE.num_layers * 2 * SHAPE.hidden_size * TOKENS**2
        expected = 3 * (flops.of(TOKENS, TOKENS**2) + 0.5 * forward_scores) / 1e6
        assert step.forward + step.backward == pytest.approx(expected)
        assert parts(step).keys() == {"forward", "backward"}


def test_weight_gradients_and_attention_may_have_rates_of_their_own():
    same = model(tflops=1e-6).of(everything)
    slow = model(tflops=1e-6, weight_gradient_tflops=5e-7, attention_tflops=2.5e-7).of(everything)
    scores = SHAPE.num_layers * 2 * SHAPE.hidden_size * TOKENS**2
    products = 2 * TOKENS * (4 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 256)
    assert slow.forward - same.forward == pytest.approx(3 * scores / 1e6)
    assert slow.backward - same.backward == pytest.approx((2.5 * 3 * scores + products) / 1e6)


def test_a_frozen_matrix_costs_no_weight_gradient_and_everything_else():
    full, half = (model(tflops=1e-6).of(trains) for trains in (everything, all_but("2.mlp.gate_proj")))
    assert half.forward == full.forward
    assert full.backward - half.backward == pytest.approx(2 * TOKENS * 64 * 128 / 1e6)


def test_below_the_lowest_weight_that_trains_nothing_goes_backward():
    step = model(tflops=1e-6, memory_bandwidth=1e-3).of(lambda unit: unit == "lm_head")
    assert step.backward == pytest.approx(2 * TOKENS * 64 * 256 / 1e6)
    # Of the rest of the backward pass there is the loss's alone: four passes over fp32 logits.
    forward = model(memory_bandwidth=1e-3).of(lambda unit: False)
    assert step.elementwise - forward.elementwise == pytest.approx(4 * 4 * TOKENS * 256 / 1e6)


def test_a_product_takes_no_less_than_its_bytes():
    # gate_proj reads its input, its output's gradient and its own gradient, and writes that.
    moved = 4 * TOKENS * (64 + 128) + 2 * 4 * 64 * 128
    full, half = (model(memory_bandwidth=1e-3).of(trains) for trains in (everything, all_but("2.mlp.gate_proj")))
    assert full.backward - half.backward == pytest.approx(moved / 1e6)


def test_recomputation_makes_the_forward_pass_of_the_layers_again_and_not_that_of_the_head():
    plain, again = (model(tflops=1e-6, training=training).of(everything) for training in (TrainingConfig(), UNIFORM))
    assert replace(again, recomputation=0.0) == plain
    assert again.recomputation == pytest.approx(plain.forward - 2 * TOKENS * 64 * 256 / 1e6)
    selective = model(tflops=1e-6, memory_bandwidth=1e-3, training=TrainingConfig(recompute_activations=True)).of(
        everything
    )
    # The core alone, and the copy of its output: read and written.
    copies = 4 * 2 * 4 * TOKENS * 64 / 1e6
    assert selective.recomputation == pytest.approx(4 * 2 * 64 * TOKENS**2 / 1e6 + copies)


def test_passes_over_memory_are_those_of_the_layers_kernels():
    step = model(memory_bandwidth=1e-3).of(everything)
    hidden = 4 * TOKENS * 64
    layer = 2 * (2 + 3) + 2 * (3 + 3) + 2 * (9 + 9) + (2 + 2) + (5 + 11) * 128 / 64
    final_norm, lookup, logits = 2 + 3, 2 + 3, (6 + 4) * 256 / 64
    assert step.elementwise == pytest.approx(hidden * (4 * layer + final_norm + lookup + logits) / 1e6)


def test_logits_in_chunks_are_made_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(derived, "WHOLE_BYTES", 4 * 256 * TOKENS // 2)
    monkeypatch.setattr(derived, "CHUNK_BYTES", 4 * 256 * TOKENS // 2)
    assert model(tflops=1e-6).of(everything).recomputation == pytest.approx(2 * TOKENS * 64 * 256 / 1e6)


def test_without_sequence_parallelism_a_layer_has_two_all_reduces_in_each_direction():
    step = model(world_size=2, tensor_model_parallel_size=2, node_bandwidth=1e-3).of(everything)
    # The embedding's forward and the head's input gradient are one more each; an all-reduce of two sends all of it.
    assert parts(step).keys() == {"tensor_parallel"}
    assert step.tensor_parallel == pytest.approx((2 * 2 * 4 + 2) * HIDDEN_BYTES / 1e6)


def test_sequence_parallelism_gathers_again_in_the_backward_pass_where_a_matrix_trains():
    layout = {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "node_bandwidth": 1e-3}
    half_of_it = HIDDEN_BYTES / 2 / 1e6
    full = model(**layout).of(everything)
    # 4 forward and 4 backward in a layer, 2 at each end of the model, and 9 inputs once more.
    assert full.tensor_parallel == pytest.approx((4 * 8 + 4 + 9) * half_of_it)
    frozen_inputs = all_but("2.self_attn.q_proj", "2.self_attn.k_proj", "2.self_attn.v_proj")
    assert full.tensor_parallel - model(**layout).of(frozen_inputs).tensor_parallel == pytest.approx(half_of_it)
    # One that is left is enough.
    assert model(**layout).of(all_but("2.self_attn.q_proj")).tensor_parallel == pytest.approx(full.tensor_parallel)


def test_weight_gradients_hide_the_sum_of_input_gradients_at_most_as_long_as_they_take():
    layout = {"world_size": 2, "tensor_model_parallel_size": 2, "node_bandwidth": 1e-3}
    alone = model(**layout).of(everything).tensor_parallel
    beside_short_products = model(**layout, tflops=1e-2).of(everything)
    weights = 2 * TOKENS * (4 * (3 * 64 * 64 + 2 * 64 * 128) + 64 * 256) / 2 / 1e10
    assert alone - beside_short_products.tensor_parallel == pytest.approx(weights)
    # Those of the forward pass are left, however long products take.
    beside_long_products = model(**layout, tflops=1e-9).of(everything)
    assert beside_long_products.tensor_parallel == pytest.approx((2 * 4 + 1) * HIDDEN_BYTES / 1e6)


def test_the_bubble_is_p_minus_1_micro_batches_of_even_stages_and_interleaving_divides_it():
    # A vocabulary of nothing but one row makes stages as good as even.
    even = replace(SHAPE, vocab_size=1)
    one = model(tflops=1e-6, shape=even, pipeline_model_parallel_size=4, world_size=4).of(everything)
    many = model(tflops=1e-6, shape=even, pipeline_model_parallel_size=4, world_size=4, micro_batches=8).of(everything)
    assert many.pipeline_bubble == one.pipeline_bubble
    assert many.pipeline_bubble == pytest.approx(3 / 8 * (many.forward + many.backward), rel=1e-2)
    layout = {"pipeline_model_parallel_size": 2, "world_size": 2, "micro_batches": 8, "tflops": 1e-6, "shape": even}
    plain, interleaved = (
        model(**layout, num_layers_per_virtual_pipeline_stage=chunk).of(everything) for chunk in (None, 1)
    )
    assert interleaved.pipeline_bubble == pytest.approx(plain.pipeline_bubble / 2)
    assert interleaved.forward == plain.forward


def test_the_bubble_of_uneven_stages_is_the_time_of_the_others():
    sizes = {"decoder_first_pipeline_num_layers": 3, "pipeline_model_parallel_size": 2}
    step = model(tflops=1e-6, world_size=2, micro_batches=5, **sizes).of(everything)
    layer = 3 * 2 * TOKENS * (4 * 64 * 64 + 3 * 64 * 128) + 3.5 * 2 * 64 * TOKENS**2
    head = 3 * 2 * TOKENS * 64 * 256
    assert step.pipeline_bubble == pytest.approx((layer + head) / 1e6)
    # The attention's scores and the first stage's: nothing needs the gradient of what comes from the embedding but it.
    assert step.forward + step.backward == pytest.approx(5 * 3 * layer / 1e6)


def test_a_stage_sends_hidden_states_up_and_gradients_down_once_for_each_micro_batch_and_boundary():
    layout = {"world_size": 2, "pipeline_model_parallel_size": 2, "node_bandwidth": 1e-3, "micro_batches": 8}
    step = model(**layout).of(everything)
    assert step.pipeline_sends == pytest.approx(8 * HIDDEN_BYTES / 1e6)
    chunks = {**layout, "num_layers_per_virtual_pipeline_stage": 1}
    # Each stage has three ends of chunks that aren't ends of the model.
    assert model(**chunks, overlap_p2p_communication=False).of(everything).pipeline_sends == pytest.approx(
        3 * step.pipeline_sends
    )
    assert model(**chunks, tflops=1e-9).of(everything).pipeline_sends == 0


def test_a_tied_embedding_is_summed_over_first_and_last_stage_where_it_trains():
    tied = replace(SHAPE, tie_embeddings=True)
    layout = {"world_size": 2, "pipeline_model_parallel_size": 2, "node_bandwidth": 1e-3, "shape": tied}
    summed = model(**layout).of(everything).pipeline_sends - model(**layout).of(all_but("embed_tokens")).pipeline_sends
    assert summed == pytest.approx(4 * 256 * 64 / 1e6)


def test_data_parallel_ranks_send_all_but_one_part_of_both_buffers():
    layout = model(world_size=4, node_bandwidth=1e-3)
    [rank, *_] = layout.costs.stage_costs(everything, 0)
    step = layout.of(everything)
    assert step.reduce_scatter == pytest.approx(rank.reduce_scatter_bytes * 3 / 4 / 1e6)
    assert step.all_gather == pytest.approx(rank.all_gather_bytes * 3 / 4 / 1e6)
    assert parts(step).keys() == {"reduce_scatter", "all_gather"}


def test_a_ring_over_nodes_has_as_many_links_between_them_as_ranks_on_a_node():
    buffer = model(world_size=16).costs.stage_costs(everything, 0)[0].reduce_scatter_bytes * 15 / 16 / 1e6
    slow = {"world_size": 16, "network_bandwidth": 1e-3}
    assert model(**slow).of(everything).reduce_scatter == pytest.approx(buffer / 8)
    # No faster than the links within a node.
    within = model(**slow, node_bandwidth=2e-3).of(everything).reduce_scatter
    assert within == pytest.approx(buffer / 2)
    # One rank of each ring on a node.
    tensor = model(**slow, tensor_model_parallel_size=4, devices_per_node=4).of(everything)
    shard = model(world_size=16, tensor_model_parallel_size=4).costs.stage_costs(everything, 0)[0]
    assert tensor.reduce_scatter == pytest.approx(shard.reduce_scatter_bytes * 3 / 4 / 1e6)


def test_overlap_hides_at_most_the_compute_there_is_and_never_the_last_bucket():
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1}
    layout = {"world_size": 2, "node_bandwidth": 1e-3}
    plain = model(**layout).of(everything)
    # More of them have more padding.
    bucketed = model(**layout, **overlap).costs.stage_costs(everything, 0)[0].all_gather_bytes / 2 / 1e6
    # Of the last micro-batch alone, and of the first one's forward pass.
    little = model(**layout, **overlap, tflops=1.0, micro_batches=4).of(everything)
    assert bucketed - little.reduce_scatter == pytest.approx(little.backward / 4)
    assert bucketed - little.all_gather == pytest.approx(little.forward / 4)
    # The embedding's bucket is the last to be complete.
    much = model(**layout, **overlap, tflops=1e-9).of(everything)
    assert much.reduce_scatter == pytest.approx(4 * 256 * 64 / 2 / 1e6)
    one_bucket = model(**layout, overlap_grad_reduce=True, tflops=1e-9).of(everything)
    assert one_bucket.reduce_scatter == pytest.approx(plain.reduce_scatter)


def test_stages_that_overlap_their_gathers_wait_for_them_one_after_the_other():
    layout = {"world_size": 4, "pipeline_model_parallel_size": 2, "node_bandwidth": 1e-3, "network_bandwidth": 1e-3}
    plain = model(**layout)
    sent = [plain.costs.stage_costs(everything, stage)[0].all_gather_bytes / 2 / 1e6 for stage in (0, 1)]
    assert plain.of(everything).all_gather == pytest.approx(max(sent))
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 10**9}
    assert model(**layout, **overlap).of(everything).all_gather == pytest.approx(sum(sent))


def test_nothing_is_hidden_on_a_device_that_cannot_send_beside_compute():
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1}
    links = {"node_bandwidth": 1e-3, "sends_beside_compute": False}
    tensor = model(world_size=2, tensor_model_parallel_size=2, **links, tflops=1e-9).of(everything)
    assert tensor.tensor_parallel == pytest.approx((2 * 2 * 4 + 2) * HIDDEN_BYTES / 1e6)
    data = model(world_size=2, **overlap, **links, tflops=1e-9)
    sent = data.costs.stage_costs(everything, 0)[0].all_gather_bytes / 2 / 1e6
    assert data.of(everything).reduce_scatter == pytest.approx(sent)
    assert data.of(everything).all_gather == pytest.approx(sent)
    chunks = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "world_size": 2}
    assert model(**chunks, **links, tflops=1e-9, micro_batches=2).of(everything).pipeline_sends > 0


def test_later_stages_reduce_while_the_first_still_goes_backward():
    layout = {"world_size": 4, "pipeline_model_parallel_size": 2, "node_bandwidth": 1e-3}
    norm, above = "model.layers.0.input_layernorm", "model.layers.3."

    def trains(unit: str) -> bool:
        return unit == norm or unit.startswith(above)

    [first, *_], [last, *_] = (model(**layout).costs.stage_costs(trains, stage) for stage in (0, 1))
    assert model(**layout).of(trains).reduce_scatter == pytest.approx(last.reduce_scatter_bytes / 2 / 1e6)
    hidden = model(**layout, tflops=1e-9).of(trains).reduce_scatter
    assert hidden == pytest.approx(first.reduce_scatter_bytes / 2 / 1e6)
    # Where nothing goes backward below, there is nothing to reduce beside.
    alone = model(**layout, tflops=1e-9).of(lambda unit: unit.startswith(above))
    assert alone.reduce_scatter == pytest.approx(last.reduce_scatter_bytes / 2 / 1e6, rel=1e-2)


def test_the_optimizer_moves_7_numbers_of_what_a_rank_updates_and_norm_and_clipping_5_more():
    layout = model(world_size=2, memory_bandwidth=1e-3)
    trains = all_but("q_proj", "gate_proj")
    step = layout.of(trains)
    rank = max(layout.costs.stage_costs(trains, 0), key=lambda rank: rank.optimizer_bytes)
    updated = rank.optimizer_bytes // 8
    assert step.optimizer == pytest.approx(28 * updated / 1e6)
    assert step.gradient_buffer == pytest.approx((8 + 12) * updated / 1e6)
    bf16 = replace(layout, costs=replace(layout.costs, bf16=True)).of(trains)
    assert bf16.optimizer == pytest.approx((28 + 6) * updated / 1e6)


def test_a_step_is_the_sum_of_its_parts_and_tokens_are_those_of_all_ranks():
    layout = model(
        world_size=4, pipeline_model_parallel_size=2, micro_batches=3, tflops=1e-6, memory_bandwidth=1, node_bandwidth=1
    )
    step = layout.of(everything)
    assert step.total == pytest.approx(sum(vars(step).values()))
    assert layout.tokens == 2 * 3 * TOKENS
    flops = step_flops(SHAPE, ParallelConfig(), TrainingConfig(), everything, micro_batch_tokens=TOKENS)
    assert layout.model_flops() == flops.model.of(layout.tokens, 6 * TOKENS**2)


def test_parts_stand_in_the_chunk_that_has_them():
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    found = list(parts_of(SHAPE, parallel, TrainingConfig(), everything))
    assert [part.chunk for part in found if part.kind == "attention"] == [0, 1, 2, 3]
    assert (found[0].kind, found[0].chunk, found[-1].kind, found[-1].chunk) == ("embedding", 0, "head", 3)
