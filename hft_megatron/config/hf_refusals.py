"""What a ``config.json`` may ask for that this project's model does not compute. Imports no torch.

A folder that loads and then computes something slightly different is the worst outcome, so every key that would change
the result is refused by name, also those that only relatives of LLaMA have and transformers' LLaMA would ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hft_megatron.errors import UserError

ARCHITECTURES = {"llama": ("LlamaForCausalLM", "LLaMAForCausalLM"), "mistral": ("MistralForCausalLM",)}
"""``model_type`` and the classes of that kind; the second spelling is in early exports of LLaMA 1."""

MISTRAL_WINDOW = 4096
"""``sliding_window`` of a Mistral whose config.json does not name it, by transformers' MistralConfig."""

_OFF = (False, None)
_ONE = (1, None)
_NONE = (None,)
_NO_EXPERTS = (None, 0)

_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    # Biases.
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "qkv_bias": _OFF,
    "use_qkv_bias": _OFF,
    "attention_out_bias": _OFF,
    "lm_head_bias": _OFF,
    "use_bias": _OFF,
    "bias": _OFF,
    # Who attends to whom, and from where.
    "attention_chunk_size": _NONE,
    "sliding_window_pattern": _NONE,
    "alibi": _OFF,
    "position_embedding_type": ("rope", None),
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "no_rope_layers": _NONE,
    "no_rope_layer_interval": (None, 0),
    "partial_rotary_factor": _ONE,
    "rotary_pct": _ONE,
    "rope_percent": _ONE,
    "rotary_dim": _NONE,
    # Other blocks than LLaMA's.
    "use_parallel_residual": _OFF,
    "parallel_attn": _OFF,
    "use_qk_norm": _OFF,
    "qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "num_experts": _NO_EXPERTS,
    "num_local_experts": _NO_EXPERTS,
    "n_routed_experts": _NO_EXPERTS,
    "moe_num_experts": _NO_EXPERTS,
    # Scales and caps (Granite, Cohere, Gemma, MiniCPM, OLMo, Llama 4).
    "attention_multiplier": _NONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "logits_scaling": _ONE,
    "logit_scale": _ONE,
    "lm_head_multiplier": _ONE,
    "scale_emb": _ONE,
    "scale_depth": _NONE,
    "dim_model_base": _NONE,
    "scale_embedding": _OFF,
    "mup_enabled": _OFF,
    "query_pre_attn_scalar": _NONE,
    "attn_temperature_tuning": _OFF,
    "final_logit_softcapping": _NONE,
    "attn_logit_softcapping": _NONE,
    "logits_soft_cap": _NONE,
    "clip_qkv": _NONE,
    # What the numbers are and how they are multiplied.
    "attention_dropout": (0, None),
    "pretraining_tp": _ONE,
    "quantization_config": _NONE,
    "compression_config": _NONE,
}
"""Keys that change what a model computes, and the values under which it is LLaMA's; an absent key is the first."""


def refuse_other_models(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError naming the key of a ``config.json`` that asks for something else than a LLaMA.

    ``source`` is how errors call the file. Mistral is a LLaMA where its sliding window is off.
    """
    _refuse_other_architectures(config, source)
    for key, allowed in _ONLY_VALUES.items():
        if config.get(key, allowed[0]) not in allowed:
            shown = "a quantized model" if "quant" in key or "compress" in key else f"{key} = {config[key]!r}"
            raise UserError(f"{source}: {shown} is not supported; only {key} = {allowed[0]!r} is.")
    _refuse_windows(config, source)


def _refuse_other_architectures(config: Mapping[str, Any], source: str) -> None:
    model_type, classes = config.get("model_type"), config.get("architectures")
    known = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        shown = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        raise UserError(
            f"{source}: model_type is {model_type!r}{shown}, and only 'llama' and 'mistral' models can be trained."
        )
    if classes and not (isinstance(classes, list) and any(name in known for name in classes)):
        raise UserError(
            f"{source}: architectures is {classes!r}, and of {model_type!r} only {known[0]} can be trained."
        )
    own_code = config.get("auto_map")
    if isinstance(own_code, Mapping) and any(name.startswith("AutoModel") for name in own_code):
        raise UserError(
            f"{source}: auto_map says that the folder's own code computes this model, and such code is never run; "
            "use an export whose weights are those of transformers' LLaMA."
        )


def _refuse_windows(config: Mapping[str, Any], source: str) -> None:
    """Attention to everything before is what is built: no window, in no layer."""
    is_mistral = config["model_type"] == "mistral"
    window = config.get("sliding_window", MISTRAL_WINDOW if is_mistral else None)
    # Only Mistral's code lacks the switch: there the window is on whenever it has a size.
    switched_off = config.get("use_sliding_window") is False and not is_mistral
    if window is not None and not switched_off:
        absent = "" if "sliding_window" in config else " (what Mistral has when the key is absent)"
        raise UserError(
            f"{source}: sliding_window = {window!r}{absent} is not supported; only sliding_window = None is."
        )
    for layer, kind in enumerate(config.get("layer_types") or ()):
        if kind != "full_attention":
            raise UserError(
                f"{source}: layer_types has {kind!r} in layer {layer}, which is not supported; "
                "only 'full_attention' is."
            )
