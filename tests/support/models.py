"""Tiny LLaMA folders by transformers, and our model built from one at any layout. Shared by all multi-rank tests."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from hft_megatron.config.lora import LoraConfig, with_adapters
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.conversion.adapter_folder import load_adapter
from hft_megatron.conversion.load import load_weights
from hft_megatron.model.build import build_model, initialize_adapters
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.groups import Placement, start_groups

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 32,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
    "odd_vocab": {"vocab_size": 97},
    "llama3_rope": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}},
    "llama32": {
        "tie_word_embeddings": True,
        "head_dim": 24,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 16.0, "rope_theta": 500.0},
    },
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "sliding_window": None},
}
"""Differences from a 4-layer model with 4 heads in 2 groups and 96 tokens."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "pp2_uneven": {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 3},
    "pp3_uneven": {
        "pipeline_model_parallel_size": 3,
        "decoder_first_pipeline_num_layers": 1,
        "decoder_last_pipeline_num_layers": 1,
    },
    "dp2": {},
    "dp4": {},
    "pp4": {"pipeline_model_parallel_size": 4},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


def flags(layout: dict[str, Any]) -> list[str]:
    """Fields of ParallelConfig as words."""
    words = []
    for name, value in layout.items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return words


def make_llama(folder: Path, variant: str = "gqa", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Writes a random LLaMA (or Mistral) as a Hugging Face folder (weights and config, no tokenizer)."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings |= VARIANTS[variant] | overrides
    if variant == "mistral":
        model = MistralForCausalLM(MistralConfig(**settings)).to(dtype)
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    with torch.no_grad():  # norms of one would hide a norm that is not applied
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def make_llama1(folder: Path) -> Path:
    """A folder like LLaMA 1's: a config.json of few keys, fp16, rotary frequencies among the tensors."""
    from safetensors.torch import load_file, save_file

    make_llama(folder, "mha", torch.float16, rms_norm_eps=1e-6)
    config = json.loads((folder / "config.json").read_text())
    later = ("num_key_value_heads", "head_dim", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias")
    for key in (*later, "pretraining_tp", "dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16", "max_sequence_length": 128}))
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build_from_folder(
    folder: str,
    layout: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    training: TrainingConfig | None = None,
    lora: LoraConfig | None = None,
) -> tuple[list[LlamaModel], ModelShape, Placement]:
    """Our model on this rank, with the folder's weights; with new adapters, or those of --lora-adapter."""
    shape = with_adapters(ModelShape.from_hf_config(load_hf_config(folder), folder), lora or LoraConfig())
    parallel = ParallelConfig(**layout)
    placement = start_groups(parallel, shape.num_layers, seed=1)
    chunks = build_model(shape, parallel, training or TrainingConfig(), placement=placement, dtype=dtype)
    load_weights(folder, chunks, shape, placement)
    initialize_adapters(chunks, shape, seed=1, placement=placement)
    if lora is not None and lora.lora_adapter is not None:
        load_adapter(lora.lora_adapter, chunks, placement)
    return chunks, shape, placement


def forward_logits(chunks: Sequence[LlamaModel], tokens: Tensor, micro_batches: int = 2) -> list[Tensor]:
    """Logits (b, s, padded vocabulary) of every micro-batch on the last stage, through the real pipeline schedule."""
    collected: list[Tensor] = []

    def keep(logits: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        collected.append(gather_from_tensor_model_parallel_region(logits.detach()))
        return torch.zeros((), device=logits.device), {}

    def step(data: Any, chunk: LlamaModel) -> tuple[Tensor, Any]:
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return chunk(tokens, positions, None), keep

    config = chunks[0].config
    config.calculate_per_token_loss = False
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=functools.partial(step),
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=micro_batches,
            seq_length=tokens.size(1),
            micro_batch_size=tokens.size(0),
            forward_only=True,
        )
    return collected
