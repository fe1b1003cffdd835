"""Builds this rank's part of a LLaMA for a layout, with uninitialised weights."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from hft_megatron.config.adapters import ADAPTER_PARTS
from hft_megatron.config.derived import padded_vocab_size, splits_sequences, virtual_pipeline_size
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot, local_slice, parameter_slots
from hft_megatron.parallel.groups import Placement


def initialize_weights(chunks: Sequence[LlamaModel], shape: ModelShape, *, seed: int, placement: Placement) -> None:
    """Fills every parameter: norms with one, matrices from N(0, std), output projections from N(0, std / sqrt(2 L)).

    Adapters are left as they are. The scaling of ``o_proj`` and ``down_proj`` is Megatron's default (GPT-2's residual
    scaling). Rows that only pad the vocabulary are zero. The same seed gives the same model on every layout of one kind
    of device.
    """
    for slot in parameter_slots(chunks):
        if slot.is_adapter:
            continue
        with torch.no_grad():
            if slot.parameter.dim() == 1:
                slot.parameter.fill_(1.0)
            else:
                slot.parameter.copy_(local_slice(_draw(slot, shape, seed), slot, placement))


def _draw(slot: ParameterSlot, shape: ModelShape, seed: int) -> torch.Tensor:
    """The whole matrix as Hugging Face has it, fp32 on CPU."""
    std = shape.init_method_std
    if slot.unit.endswith(("o_proj", "down_proj")):
        std /= math.sqrt(2 * shape.num_layers)
    return torch.empty(whole_shape(slot.unit, shape)).normal_(0.0, std, generator=_generator(slot, seed))


@torch.no_grad()
def initialize_adapters(chunks: Sequence[LlamaModel], shape: ModelShape, *, seed: int, placement: Placement) -> None:
    """Fills every A from U(-1 / sqrt(columns), 1 / sqrt(columns)), and every B with zero; other parameters stay.

    This is Kaiming's uniform draw with a = sqrt(5), which PEFT uses. The same seed gives the same adapters on every
    layout.
    """
    for slot in parameter_slots(chunks):
        if slot.unit.endswith(ADAPTER_PARTS[0]):
            whole = torch.empty(whole_shape(slot.unit, shape))
            bound = 1 / math.sqrt(whole.size(1))
            whole.uniform_(-bound, bound, generator=_generator(slot, seed))
            slot.parameter.copy_(local_slice(whole, slot, placement))
        elif slot.is_adapter:
            slot.parameter.zero_()


def _generator(slot: ParameterSlot, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{slot.unit}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, training: TrainingConfig, *, dtype: torch.dtype
) -> TransformerConfig:
    """megatron-core's configuration of this model; every CUDA-only fusion without a fallback is off."""
    std = shape.init_method_std
    virtual_size = virtual_pipeline_size(parallel, shape.num_layers)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=std,
        # Weights come from a file or from model/initialization.py, the same for every layout.
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl=training.transformer_impl,
        pipeline_dtype=dtype,
        # Under the interleaved schedule of two stages a rank's neighbours before and after it are one rank. In one
        # batch of sends and receives between them activations would be taken for gradients: each is sent on its own.
        batch_p2p_comm=virtual_size is None,
        overlap_p2p_comm=virtual_size is not None and parallel.overlap_p2p_communication,
        # It would wait for the whole device after every transfer, for the sake of torch before 2.0.
        batch_p2p_sync=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        sequence_parallel=splits_sequences(parallel),
        # Sequences of a step share one length, but steps differ in it.
        variable_seq_lengths=False,
        # The loss is a sum over trained tokens, divided once by their number over the global batch.
        calculate_per_token_loss=True,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        deterministic_mode=training.deterministic_mode,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
    )


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    training: TrainingConfig,
    *,
    placement: Placement,
    dtype: torch.dtype,
    vocab_multiple: int = 1,
) -> list[LlamaModel]:
    """This rank's model chunks (more than one under the interleaved schedule), with uninitialised weights."""
    config = transformer_config(shape, parallel, training, dtype=dtype)
    pipeline = placement.groups.pp
    virtual_size = config.virtual_pipeline_model_parallel_size
    padded_vocab = padded_vocab_size(shape, parallel.tensor_model_parallel_size, vocab_multiple)
    chunks = []
    for stage in range(placement.virtual_stages):
        virtual_stage = stage if virtual_size is not None else None
        first = is_pp_first_stage(pipeline) and is_vp_first_stage(stage, virtual_size)
        last = is_pp_last_stage(pipeline) and is_vp_last_stage(stage, virtual_size)
        chunk = LlamaModel(
            config,
            shape,
            padded_vocab=padded_vocab,
            placement=placement,
            pre_process=first,
            post_process=last,
            virtual_stage=virtual_stage,
        )
        chunks.append(chunk.to(placement.device))
    for slot in parameter_slots(chunks):
        if slot.cut is not None:
            # megatron-core marks shards only while it initialises them itself (0.19 in part also where it does not); an
            # unmarked shard counts as a copy of rank 0's and drops out of the gradient norm, so clipping would depend
            # on the layout.
            shard: Any = slot.parameter
            shard.tensor_model_parallel, shard.partition_dim, shard.partition_stride = True, slot.cut, 1
    return chunks
