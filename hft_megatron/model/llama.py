"""LLaMA on megatron-core's ``GPTModel``, through a layer spec that keeps one parameter per category matrix."""

import importlib.util

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from hft_megatron.config.derived import padded_vocab_size, virtual_pipeline_size
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import ParallelConfig, TrainingConfig
from hft_megatron.model.layers import CategorySelfAttention, LlamaMLP, RMSNorm, TorchAttention
from hft_megatron.model.rope import scaled_inverse_frequencies
from hft_megatron.parallel.groups import Placement


def transformer_engine_is_used() -> bool:
    """Whether transformer-engine's attention and norms replace torch's: they need CUDA and the package."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, training: TrainingConfig, *, dtype: torch.dtype
) -> TransformerConfig:
    """megatron-core's configuration of this model; every CUDA-only fusion that lacks a fallback is off."""
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
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size,
        sequence_parallel=parallel.sequence_parallel,
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


def layer_spec() -> ModuleSpec:
    """One LLaMA layer. With transformer-engine its attention and norms are used, else torch's."""
    norm: type = RMSNorm
    attention: type = TorchAttention
    if transformer_engine_is_used():
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

        norm, attention = TENorm, TEDotProductAttention
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=CategorySelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=None, core_attention=attention, linear_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=LlamaMLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class LlamaModel(GPTModel):
    """One model chunk. Logits of padded vocabulary rows are minus infinity wherever they are made.

    Without that the padded rows take part in the softmax, and the loss depends on the tensor-parallel size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        *,
        padded_vocab: int,
        placement: Placement,
        pre_process: bool,
        post_process: bool,
        virtual_stage: int | None,
    ) -> None:
        spec = layer_spec()
        layers = get_num_layers_to_build(config, virtual_stage, placement.pipeline_rank)
        assert spec.submodules is not None
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[spec] * layers, layer_norm=spec.submodules.input_layernorm
            ),
            vocab_size=padded_vocab,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            pg_collection=placement.groups,
            vp_stage=virtual_stage,
        )
        self.shape = shape
        if shape.rope_scaling is not None:
            # GPTModel passes on the factor alone and fixes low, high and original length.
            self.rotary_pos_emb.inv_freq = scaled_inverse_frequencies(self.rotary_pos_emb.inv_freq, shape.rope_scaling)
        if post_process:
            rows = padded_vocab // placement.tensor_size
            self.real_rows = max(0, min(rows, shape.vocab_size - placement.tensor_rank * rows))
            if self.real_rows < rows:
                self.output_layer.register_forward_hook(self._hide_padded_rows)

    def _hide_padded_rows(self, module: torch.nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
        logits, _ = output
        logits[..., self.real_rows :] = float("-inf")


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
    return chunks
