"""What a config.json may not ask for, by name. Run: pytest tests/config/test_hf_refusals.py"""

from typing import Any

import pytest

from hft_megatron.config.hf_keys import refuse_other_models
from hft_megatron.errors import UserError

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
MISTRAL: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, 'model_type is "qwen2" (Qwen2ForCausalLM)'),
    ({"model_type": None}, "model_type is null"),
    ({"model_type": ["llama"]}, 'model_type is ["llama"]'),
    ({"architectures": ["LlamaForSequenceClassification"]}, 'architectures is ["LlamaForSequenceClassification"]'),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}, "auto_map"),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    ({"attention_bias": True}, "attention_bias = true"),
    ({"mlp_bias": True}, "mlp_bias = true"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"sliding_window": 4096}, "sliding_window = 4096"),
    ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window = 4096"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, '"sliding_attention" in layer 1'),
    ({"layer_types": ["chunked_attention"]}, '"chunked_attention" in layer 0'),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rotary_pct": 0.25}, "rotary_pct = 0.25"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers = [1, 0]"),
    ({"is_causal": False}, "is_causal = false"),
    ({"transformers_weights": "other.safetensors"}, 'transformers_weights = "other.safetensors"'),
    ({"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    ({"logit_scale": 0.0625}, "logit_scale = 0.0625"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
    ({"scale_emb": 12}, "scale_emb = 12"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ({"use_qk_norm": True}, "use_qk_norm = true"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "a quantized model is not supported (quantization_config); use a",
    ),
    (
        {"compression_config": {"format": "int-quantized"}},
        "a quantized model is not supported (compression_config); use a",
    ),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_the_model_does_not_compute_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        refuse_other_models({**LLAMA, **change}, "DIR/config.json")
    message = str(error.value)
    assert said in message
    assert message.startswith("DIR/config.json: ")
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    "harmless",
    [
        {},
        {"architectures": None},
        {"architectures": ["LLaMAForCausalLM"]},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"use_sliding_window": False},
        {"layer_types": ["full_attention", "full_attention"]},
        {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}},
        {"logits_scaling": 1.0, "num_local_experts": 0, "rope_interleaved": False, "attention_dropout": 0.0},
        {"pretraining_tp": 2},
        {"hidden_act": "swish"},
        {"max_window_layers": 2, "unsloth_version": "2024.9", "_name_or_path": "x", "use_cache": True},
    ],
)
def test_the_same_keys_are_accepted_where_they_change_nothing(harmless: dict[str, Any]) -> None:
    refuse_other_models({**LLAMA, **harmless}, "config.json")


def test_mistral_is_accepted_without_its_window_alone() -> None:
    refuse_other_models(MISTRAL, "config.json")
    for change, said in (
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        # transformers' Mistral knows no switch: the window stays on.
        ({"sliding_window": 4096, "use_sliding_window": False}, "sliding_window = 4096"),
        ({"architectures": ["LlamaForCausalLM"]}, "only MistralForCausalLM"),
    ):
        with pytest.raises(UserError, match=said):
            refuse_other_models({**MISTRAL, **change}, "config.json")
    absent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    with pytest.raises(UserError, match=r"sliding_window = 4096 \(Mistral.s default when the key is absent\)"):
        refuse_other_models(absent, "config.json")
