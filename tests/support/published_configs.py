"""config.json of published models of LLaMA's family, by their public values.

Their keys are the point: those that a model's makers wrote, and not those that a test would think of.
"""

from typing import Any

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

CONFIGS |= {
    "Llama-2-13B": {  # as it came first
        **_LLAMA2, "pretraining_tp": 2, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 40,
    },
    "SmolLM2-135M": {
        **_LLAMA, "_name_or_path": "checkpoints", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "vocab_size": 49152,
    },
    "Yi-6B": {
        **_LLAMA, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 5000000.0, "torch_dtype": "bfloat16", "transformers_version": "4.34.0", "vocab_size": 64000,
    },
    "Vicuna-7B-v1.5": {
        **_LLAMA2, "_name_or_path": "vicuna-7b-v1.5", "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0,
        "transformers_version": "4.31.0",
    },
    "CodeLlama-7B": {
        **_LLAMA, "_name_or_path": "codellama/CodeLlama-7b-hf", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 16384, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 1000000, "torch_dtype": "bfloat16", "vocab_size": 32016,
    },
    "OpenLLaMA-3B": {
        **_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 3200, "intermediate_size": 8640,
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 26, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.30.0.dev0", "vocab_size": 32000,
    },
    "DeepSeek-LLM-7B": {
        **_LLAMA, "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "vocab_size": 102400,
    },
    "Phi-4 as LLaMA": {
        **_LLAMA, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 100257, "eos_token_id": 100265,
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
        "mlp_bias": False, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384, "pad_token_id": 100351, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 250000, "torch_dtype": "bfloat16", "unsloth_fixed": True,
        "vocab_size": 100352,
    },
}  # fmt: skip

_MISTRAL = CONFIGS["Mistral-7B-v0.3"]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Mistral-7B-v0.1": (
        {**_MISTRAL, "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096,
         "vocab_size": 32000},
        "sliding_window = 4096",
    ),
    "Vicuna-7B-v1.5-16k": (
        {**CONFIGS["Vicuna-7B-v1.5"], "max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        "rope type 'linear'",
    ),
    "DeepSeek-Coder-6.7B": (
        {**CONFIGS["DeepSeek-LLM-7B"], "bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384,
         "num_hidden_layers": 32, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
         "vocab_size": 32256},
        "rope type 'linear'",
    ),
    "InternLM2-7B": (
        {"architectures": ["InternLM2ForCausalLM"], "auto_map": {"AutoModelForCausalLM":
         "modeling_internlm2.InternLM2ForCausalLM"}, "bias": False, "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "internlm2",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
         "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000, "vocab_size": 92544},
        'model_type is "internlm2" (InternLM2ForCausalLM)',
    ),
    "InternLM-7B as LLaMA": (
        {**_LLAMA, "bias": True, "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048,
         "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-06, "vocab_size": 103168},
        "bias = true",
    ),
    "Granite-3.1-8B": (
        {**_LLAMA, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_multiplier": 0.0078125,
         "embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22},
        'model_type is "granite" (GraniteForCausalLM)',
    ),
    "Granite that claims to be a LLaMA": (
        {**_LLAMA3, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
         "residual_multiplier": 0.22},
        "attention_multiplier = 0.0078125",
    ),
    "Llama-2-7B by GPTQ": (
        {**CONFIGS["Llama-2-7B"], "quantization_config": {"bits": 4, "group_size": 128, "quant_method": "gptq"}},
        "a quantized model",
    ),
}  # fmt: skip
"""With a part of the sentence that refuses each."""
