"""Memory by formula against the allocations of real steps on a CPU. Run: pytest tests/costs/test_rank_memory.py"""

from dataclasses import replace
from typing import Any

import pytest

from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.costs.rank_memory import MemoryModel, MicroBatch
from hft_megatron.trainer.loop import next_step
from hft_megatron.trainer.method import run_schedule
from tests.support.allocations import Allocations
from tests.support.models import LAYOUTS, make_llama
from tests.support.probe import cost_model
from tests.support.shapes import tiny_shape
from tests.support.tiers import quick
from tests.support.toy_training import GLOBAL_BATCH, make_run
from tests.trainer.test_frozen_bottom import BLOCK, EMBEDDING, FIRST, SELECTIVE, UNIFORM

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA_70B = ModelShape(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)

Case = tuple[int, str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "full": (1, "tp1", {"bf16": True}, {"hft_ratio": 1.0}),
    "half": (1, "tp1", {"bf16": True}, {}),
    "half, fp32": (1, "tp1", {}, {}),
    "half, uniform": (1, "tp1", {"bf16": True, **UNIFORM}, {}),
    "full, block": (1, "tp1", {"bf16": True, **BLOCK}, {"hft_ratio": 1.0}),
    "half, selective": (1, "tp1", {"bf16": True, **SELECTIVE}, {}),
    "bottom frozen": (1, "tp1", {"bf16": True}, {"hft_freeze": f"{EMBEDDING},{FIRST}"}),
    "half, tensor parallel": (2, "tp2", {"bf16": True}, {}),
    "full, sequence parallel": (2, "tp2_sp", {"bf16": True}, {"hft_ratio": 1.0}),
    "half, sequence parallel, uniform": (2, "tp2_sp", {"bf16": True, **UNIFORM}, {}),
    "half, uneven stages": (2, "pp2_uneven", {"bf16": True}, {}),
    "half, bf16 gradients": (1, "tp1", {"bf16": True, "accumulate_allreduce_grads_in_fp32": False}, {}),
    "half, interleaved": (2, "pp2_vpp", {"bf16": True}, {}),
    "adapters": (1, "tp1", {"bf16": True}, {"lora": {"lora_rank": 8}}),
    "adapters, sequence parallel": (2, "tp2_sp", {"bf16": True}, {"lora": {"lora_rank": 8, "lora_dropout": 0.1}}),
}
"""Ranks, layout, options of training, and what trains."""
QUICK = ["full", "half", "half, fp32", "half, selective", "bottom frozen", "half, tensor parallel"]


def run_measured(folder: str, layout: str, training: dict, hft: dict) -> list[int]:
    """One step's forward and backward passes: what this rank allocated and held at most, and the formula's word."""
    ratio = hft.pop("hft_ratio", 0.5)
    lora, training = LoraConfig(**hft.pop("lora", {})), {"micro_batch_size": 2} | training
    run = make_run(folder, LAYOUTS[layout], ratio=ratio, training=training, hft=hft, lora=lora)
    next_step(run)  # what is made once is there
    batch = run.batches.step(GLOBAL_BATCH)
    run.wrapped.zero_gradients()
    with Allocations() as allocations:
        run_schedule(run.objective.forward_step, run.wrapped.chunks, batch, forward_only=False)
    model = MemoryModel(
        costs=cost_model(run),
        training=run.config.training,
        micro_batch=MicroBatch(sequences=batch.sequences, seq_length=batch.seq_length),
        micro_batches=len(batch.micro_batches),
        on_cuda=False,
    )
    memory = model.stage(run.wrapped.plan.trains, run.placement.pipeline_rank)
    weights = sum(weight.nbytes for chunk in run.wrapped.modules for weight in chunk.parameters())
    held = [weights, run.wrapped.shards.gradient_bytes]
    held.append(run.wrapped.shards.master_bytes + run.wrapped.shards.moment_bytes)
    assert held == [memory.weights, memory.gradients, memory.optimizer]
    return [allocations.most, memory.activations + memory.logits]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("memory") / "model", vocab_size=1024, **SIZES))


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_a_step_takes_what_the_formula_says_within_a_tenth(ranks, folder, name):
    size, layout, training, hft = CASES[name]
    for most, formula in ranks(size).run(run_measured, folder=folder, layout=layout, training=training, hft=hft):
        assert formula == pytest.approx(most, rel=0.1)


def test_bf16_gradients_take_half_and_the_optimizer_makes_fp32_ones_when_activations_are_gone() -> None:
    costs = CostModel(shape=tiny_shape(4), parallel=ParallelConfig(), world_size=2, bf16=True)
    small, large = MicroBatch(sequences=1, seq_length=1), MicroBatch(sequences=8, seq_length=128)
    for batch in (small, large):
        model = MemoryModel(costs=costs, training=TrainingConfig(), micro_batch=batch)
        other = replace(model, costs=replace(costs, fp32_gradients=False))
        fp32, bf16 = model.largest(everything), other.largest(everything)
        assert bf16.gradients == fp32.gradients / 2
        assert (bf16.weights, bf16.optimizer, bf16.logits) == (fp32.weights, fp32.optimizer, fp32.logits)
        # Of 12 bytes of the optimizer's 4 are a master, and so many a gradient.
        assert bf16.activations + bf16.logits == max(fp32.activations + fp32.logits, fp32.optimizer / 3)


@pytest.mark.parametrize(("bf16", "bytes_per_element"), [(True, 12), (False, 8)])
def test_what_holds_weights_to_earlier_tasks_takes_eight_bytes_for_each(bf16: bool, bytes_per_element: int) -> None:
    costs = CostModel(shape=tiny_shape(4), parallel=ParallelConfig(), world_size=2, bf16=bf16)
    model = MemoryModel(costs=costs, training=TrainingConfig(), micro_batch=MicroBatch(sequences=1, seq_length=8))
    free, held = model.largest(everything), replace(model, holds_fisher=True).largest(everything)
    assert held.optimizer - free.optimizer == free.optimizer * 8 / bytes_per_element
    assert held.total - free.total == held.optimizer - free.optimizer


def everything(unit: str) -> bool:
    """Full fine-tuning."""
    return True
