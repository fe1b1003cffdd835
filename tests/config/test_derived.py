"""Numbers that follow from the options. Run: pytest tests/config/test_derived.py"""

import pytest

from hft_megatron.config import derived
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=301,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(
    ("tensor", "divisible_by", "rows"), [(1, 1, 301), (2, 1, 302), (4, 1, 304), (2, 128, 512), (7, 43, 301)]
)
def test_the_vocabulary_is_padded_to_the_next_multiple(tensor: int, divisible_by: int, rows: int) -> None:
    assert derived.padded_vocab_size(SHAPE, tensor, divisible_by) == rows


def test_batches_follow_from_the_layout() -> None:
    config = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        training=TrainingConfig(micro_batch_size=3),
    )
    assert derived.data_parallel_size(config.parallel, world_size=8) == 2
    assert derived.global_batch_size(config, world_size=8) == 6
    larger = RunConfig(parallel=config.parallel, training=TrainingConfig(micro_batch_size=3, global_batch_size=24))
    assert derived.global_batch_size(larger, world_size=8) == 24


def test_virtual_stages_count_the_chunks_of_one_rank() -> None:
    plain = ParallelConfig(pipeline_model_parallel_size=2)
    assert derived.virtual_pipeline_size(plain, 8) is None
    assert derived.layers_of_chunks(plain, 8) == (range(4), range(4, 8))
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    assert derived.virtual_pipeline_size(interleaved, 8) == 4
    assert derived.layers_of_chunks(interleaved, 8) == tuple(range(layer, layer + 1) for layer in range(8))


def test_warm_up_has_two_forms() -> None:
    assert derived.warmup_steps(OptimizerConfig(lr_warmup_iters=7), span=100) == 7
    assert derived.warmup_steps(OptimizerConfig(lr_warmup_fraction=0.03), span=100) == 3


def test_resolving_fills_in_what_the_options_leave_open() -> None:
    resolved = derived.resolve(RunConfig(training=TrainingConfig(seed=9)), SHAPE, world_size=4)
    assert resolved.training == TrainingConfig(seed=9, global_batch_size=4, seq_length=128, train_iters=100)
    assert resolved.hft.hft_seed == 9


def test_a_resumed_run_keeps_its_batch_size_and_dtype_at_another_layout() -> None:
    saved = RunConfig(
        training=TrainingConfig(global_batch_size=4, seq_length=100, bf16=True, train_iters=100),
        hft=HFTConfig(hft_seed=3),
    )
    resolved = derived.resolve(RunConfig(), SHAPE, world_size=1, saved=saved)
    assert resolved.training == saved.training
    assert resolved.hft == saved.hft


def test_epochs_stay_epochs_until_the_data_is_read() -> None:
    resolved = derived.resolve(RunConfig(training=TrainingConfig(train_epochs=2)), SHAPE, world_size=4)
    assert (resolved.training.train_iters, resolved.training.train_epochs) == (None, 2)
    with pytest.raises(AssertionError, match="epochs become iterations"):
        derived.train_iters(resolved.training)


def test_a_resuming_command_overrides_the_options_of_the_run() -> None:
    saved = RunConfig(training=TrainingConfig(global_batch_size=4, bf16=True), hft=HFTConfig(hft_seed=3))
    new = RunConfig(training=TrainingConfig(global_batch_size=8, bf16=False, train_iters=7), hft=HFTConfig(hft_seed=5))
    resolved = derived.resolve(new, SHAPE, world_size=1, saved=saved)
    assert (resolved.training.global_batch_size, resolved.training.bf16, resolved.training.train_iters) == (8, False, 7)
    assert resolved.hft.hft_seed == 5
