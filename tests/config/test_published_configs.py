"""Published models: their config.json gives the right shape and number of parameters. Run: pytest tests/config"""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": False,
}
_LLAMA1 = {
    **_LLAMA,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "vocab_size": 32000,
}
_LLAMA2 = {
    **_LLAMA,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
_LLAMA3 = {
    **_LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_ROPE_31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA-7B": _LLAMA1,
    "Llama-2-7B": {
        **_LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    "Llama-2-70B": {
        **_LLAMA2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
    "Llama-3-8B": _LLAMA3,
    "Llama-3.1-8B": {**_LLAMA3, "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": _ROPE_31},
    "Llama-3.2-1B": {
        **_LLAMA3,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_hidden_layers": 16,
        "rope_scaling": {**_ROPE_31, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": {
        **_LLAMA,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "vocab_size": 32000,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
}

# layers, hidden, feed-forward, heads, groups, channels, vocabulary, positions, epsilon, base, factor, tied, parameters
EXPECTED: dict[str, tuple[Any, ...]] = {
    "LLaMA-7B": (32, 4096, 11008, 32, 32, 128, 32000, 2048, 1e-6, 1e4, None, False, 6_738_415_616),
    "Llama-2-7B": (32, 4096, 11008, 32, 32, 128, 32000, 4096, 1e-5, 1e4, None, False, 6_738_415_616),
    "Llama-2-70B": (80, 8192, 28672, 64, 8, 128, 32000, 4096, 1e-5, 1e4, None, False, 68_976_648_192),
    "Llama-3-8B": (32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, 5e5, None, False, 8_030_261_248),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, 131072, 1e-5, 5e5, 8.0, False, 8_030_261_248),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256, 131072, 1e-5, 5e5, 32.0, True, 1_235_814_400),
    "TinyLlama-1.1B": (22, 2048, 5632, 32, 4, 64, 32000, 2048, 1e-5, 1e4, None, False, 1_100_048_384),
    "Mistral-7B-v0.3": (32, 4096, 14336, 32, 8, 128, 32768, 32768, 1e-5, 1e6, None, False, 7_248_023_552),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_gives_its_shape_and_number_of_parameters(name: str) -> None:
    layers, hidden, ffn, heads, groups, channels, vocab, positions, epsilon, base, factor, tied, count = EXPECTED[name]
    scaling = None
    if factor is not None:
        scaling = Llama3RopeScaling(
            factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        )
    shape = ModelShape.from_hf_config(CONFIGS[name], "config.json")
    assert shape == ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=vocab,
        max_position_embeddings=positions,
        norm_epsilon=epsilon,
        rotary_base=base,
        rope_scaling=scaling,
        tie_embeddings=tied,
    )
    assert shape.parameter_count() == count


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_counts_the_same_parameters_and_names_the_same_tensors(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hft_megatron.hft.units import units_of
    from hft_megatron.model.parameter_names import whole_shape

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shape = ModelShape.from_hf_config(CONFIGS[name], "config.json")
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameter_count()
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert theirs == {f"{unit.name}.weight": whole_shape(unit.name, shape) for unit in units_of(shape)}


def test_keys_that_a_mistral_leaves_out_have_mistrals_defaults() -> None:
    from transformers import MistralConfig

    config = CONFIGS["Mistral-7B-v0.3"]
    left_out = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    shape = ModelShape.from_hf_config({key: config[key] for key in config if key not in left_out}, "config.json")
    defaults = MistralConfig()
    assert shape.num_query_groups == defaults.num_key_value_heads
    assert shape.max_position_embeddings == defaults.max_position_embeddings
    assert shape.norm_epsilon == defaults.rms_norm_eps
    assert shape.rotary_base == defaults.rope_parameters["rope_theta"]
