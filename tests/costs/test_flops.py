"""FLOPs by formula against the products that the engine makes. Run: pytest tests/costs/test_flops.py"""

from dataclasses import replace
from math import prod
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hft_megatron.config import derived
from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.flops import NO_EXTRA_WORK, ExtraWork, Flops, step_flops
from hft_megatron.methods.dpo.reference import SharedReference
from hft_megatron.methods.objectives.asked import FirstWeights, InTurn, TrainedModel
from hft_megatron.methods.objectives.last_hidden import attach_hidden_states
from hft_megatron.methods.objectives.registry import chosen, kl_weight, objective_of
from hft_megatron.trainer.loop import next_step
from hft_megatron.trainer.run import Run
from tests.costs.test_rank_costs import SHAPE
from tests.support.models import LAYOUTS, make_llama
from tests.support.plain_run import parse
from tests.support.tiers import quick
from tests.support.toy_training import GLOBAL_BATCH, TINY, make_run
from tests.trainer.test_frozen_bottom import BLOCK, EMBEDDING, FIRST, SECOND, SELECTIVE, UNIFORM

LLAMA2_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
    max_position_embeddings=4096,
)
OUTPUT_OF_FIRST = "model.layers.0.self_attn.[qkv]_proj,model.layers.0.input_layernorm"

Case = tuple[int, str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "full": (1, "tp1", {}, {"hft_ratio": 1.0}),
    "half": (1, "tp1", {}, {}),
    "half, sequence parallel": (2, "tp2_sp", {}, {}),
    "half, interleaved stages": (2, "pp2_vpp", {}, {}),
    "half, uniform": (1, "tp1", UNIFORM, {}),
    "half, block, uneven stages": (2, "pp2_uneven", {**BLOCK, "recompute_num_layers": 2}, {}),
    "half, selective": (1, "tp1", SELECTIVE, {}),
    "bottom frozen": (1, "tp1", {}, {"hft_freeze": f"{EMBEDDING},{FIRST}"}),
    "bottom frozen, selective": (1, "tp1", SELECTIVE, {"hft_freeze": f"{EMBEDDING},{FIRST}"}),
    "bottom frozen, two stages": (2, "pp2", {}, {"hft_freeze": f"{EMBEDDING},{FIRST},{SECOND},model.layers.2.*"}),
    "bottom frozen, uniform": (1, "tp1", UNIFORM, {"hft_freeze": f"{EMBEDDING},{FIRST}"}),
    "all recomputed layers frozen": (1, "tp1", BLOCK, {"hft_freeze": f"{EMBEDDING},{FIRST},{SECOND}"}),
    "o_proj is the lowest": (1, "tp1", {}, {"hft_ratio": 1.0, "hft_freeze": f"{EMBEDDING},{OUTPUT_OF_FIRST}"}),
    "head frozen": (1, "tp1", {}, {"hft_freeze_head": True}),
    "adapters": (2, "tp2_sp", {}, {"lora": {"lora_rank": 3}}),
    "a few adapters, uniform": (2, "pp2", UNIFORM, {"lora": {"lora_rank": 3, "lora_targets": "v_proj,o_proj"}}),
    "ift beside adapters": (2, "tp2_sp", {}, {"lora": {"lora_rank": 3}, "asks": ["--objective", "ift"]}),
    "talr beside adapters": (2, "pp2", {}, {"lora": {"lora_rank": 3}, "asks": ["--objective", "talr"]}),
    "divergence": (2, "tp2", {}, {"asks": ["--kl-to-base", "0.1"]}),
    "divergence from adapters": (1, "tp1", {}, {"lora": {"lora_rank": 3}, "asks": ["--kl-to-base", "0.1"]}),
    "loss in chunks": (2, "tp2", {}, {"whole_bytes": 2**13}),
    "loss in chunks, head frozen": (1, "tp1", {}, {"whole_bytes": 2**13, "hft_freeze_head": True}),
}
"""Ranks, layout, recomputation, and what trains."""
QUICK = ["full", "half", "half, selective", "bottom frozen, two stages", "head frozen", "adapters", "loss in chunks"]
QUICK += ["ift beside adapters", "divergence"]


def run_counted(folder: str, layout: str, recompute: dict, hft: dict) -> dict[str, int]:
    """One step: what this rank's matrices and its attention cost, and what the formula says of all ranks."""
    ratio, whole_bytes = hft.pop("hft_ratio", 0.5), hft.pop("whole_bytes", derived.WHOLE_BYTES)
    with patch.multiple(derived, WHOLE_BYTES=whole_bytes, CHUNK_BYTES=whole_bytes):
        return counted(folder, layout, recompute, hft, ratio)


def counted(folder: str, layout: str, recompute: dict, hft: dict, ratio: float) -> dict[str, int]:
    lora, asks = LoraConfig(**hft.pop("lora", {})), hft.pop("asks", [])
    run = make_run(folder, LAYOUTS[layout], ratio=ratio, training=recompute, hft=hft, lora=lora)
    if asks:
        ask(run, parse("sft", ["--load-hf", folder, *asks]))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counts = {"forward": 0, "backward": 0}

    def causal(name: str, products: int) -> Any:
        def count(query: torch.Size, *args: Any, **kwargs: Any) -> int:
            # Half of the scores, in two products forward and four backward.
            flops = products * prod(query) * query[-2]
            counts[name] += flops
            return 0

        return count

    def backward(grad_output: torch.Size, query: torch.Size, *args: Any, **kwargs: Any) -> int:
        return int(causal("backward", 4)(query))

    mapping = {
        flash: causal("forward", 2),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        # In place, which torch's counter doesn't know.
        torch.ops.aten.addmm_: lambda total, left, right, **kwargs: 2 * prod(left) * right[-1],
    }
    batch = run.batches.step(0)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        next_step(run)
    flops = step_flops(
        run.wrapped.modules[0].shape,
        run.config.parallel,
        run.config.training,
        run.wrapped.plan.trains,
        micro_batch_tokens=batch.sequences * batch.seq_length,
        extra=NO_EXTRA_WORK if run.reference is None else run.reference.extra_work,
    ).actual
    # The engine computes padding as well.
    tokens, squares = GLOBAL_BATCH * batch.seq_length, GLOBAL_BATCH * batch.seq_length**2
    return {
        "matrices": counter.get_total_flops(),
        "attention": sum(counts.values()),
        "matrices by formula": flops.of(tokens, 0),
        "attention by formula": flops.of(0, squares),
    }


def ask(run: Run, config: RunConfig) -> None:
    """Gives a run the objective of these options, and what that asks before each step."""
    chunks, adapted = run.wrapped.modules, run.wrapped.modules[0].shape.adapters is not None
    asked: list[Any] = []
    if kl_weight(config) > 0:
        first = SharedReference(chunks, run.wrapped.plan.training, attach_hidden_states, adapted=adapted)
        asked.append(FirstWeights(first, run.placement))
    if (question := chosen(config).question) is not None:
        asked.append(TrainedModel(chunks, question(), run.placement))
    run.objective, run.reference = objective_of(config), InTurn(asked)
    run.reference.at_round_start(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("flops") / "model", **TINY))


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_the_engine_makes_exactly_the_products_that_the_formula_counts(ranks, folder, name):
    size, layout, recompute, hft = CASES[name]
    found = ranks(size).run(run_counted, folder=folder, layout=layout, recompute=recompute, hft=hft)
    for part in ("matrices", "attention"):
        assert sum(rank[part] for rank in found) == found[0][f"{part} by formula"] > 0, part


def test_model_flops_are_6_per_matrix_parameter_and_token_and_as_megatron_lm_counts_attention():
    flops = step_flops(LLAMA2_7B, ParallelConfig(), TrainingConfig(), lambda unit: True, micro_batch_tokens=8)
    matrices = LLAMA2_7B.parameter_count() - (32000 + 65) * 4096  # without embedding and norms
    assert flops.model == flops.actual == Flops(per_token=6 * matrices, per_squared_length=6 * 32 * 4096)
    # NVIDIA's 39.8 GFLOP per token for SFT is that of short examples in a pack, here of 206 tokens.
    assert flops.model.of(4096, 4096 * 206) / 4096 == pytest.approx(39.8e9, rel=1e-3)
    assert flops.model.of(4096, 4096 * 4096) / 4096 == pytest.approx(42.9e9, rel=1e-3)


def test_whatever_trains_and_is_recomputed_the_model_flops_are_those_of_full_fine_tuning():
    full = step_flops(SHAPE, ParallelConfig(), TrainingConfig(), lambda unit: True, micro_batch_tokens=8)
    recompute = TrainingConfig(**UNIFORM)
    none = step_flops(SHAPE, ParallelConfig(), recompute, lambda unit: unit == "lm_head", micro_batch_tokens=8)
    assert none.model == full.model
    # Nothing below the head needs a gradient: none is made of its input, and nothing is recomputed.
    head = 2 * SHAPE.vocab_size * SHAPE.hidden_size
    assert none.actual.per_token == full.model.per_token // 3 + head
    assert 3 * none.actual.per_squared_length == full.model.per_squared_length


def test_a_tied_head_is_counted_as_a_matrix_and_trains_with_the_embedding():
    tied = replace(SHAPE, tie_embeddings=True)
    for trains in (lambda unit: True, lambda unit: unit != "model.embed_tokens"):
        flops = step_flops(tied, ParallelConfig(), TrainingConfig(), trains, micro_batch_tokens=8)
        both = step_flops(
            SHAPE,
            ParallelConfig(),
            TrainingConfig(),
            lambda unit, trains=trains: trains("model.embed_tokens" if unit == "lm_head" else unit),
            micro_batch_tokens=8,
        )
        assert flops == both


def test_a_reference_in_memory_costs_one_forward_pass_more():
    once, twice = (
        step_flops(
            SHAPE,
            ParallelConfig(),
            TrainingConfig(),
            lambda unit: True,
            micro_batch_tokens=8,
            extra=ExtraWork(forward_passes=extra),
        )
        for extra in (0, 1)
    )
    assert twice.model == once.model
    assert 3 * twice.actual.per_token == 4 * once.actual.per_token
    assert 3 * twice.actual.per_squared_length == 4 * once.actual.per_squared_length
