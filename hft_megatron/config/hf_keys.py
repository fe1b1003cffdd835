"""The keys of a LLaMA's config.json: those that are used, ignored or refused, and why. Imports no torch.

A folder that loads and then computes something slightly different is the worst outcome, so a key that changes what a
model computes is used, or refused by name; so are keys that only relatives of LLaMA have and transformers' LLaMA would
ignore. A key that stands nowhere here is named in the log. docs/models.md shows this
table, and a test holds that it does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hft_megatron.errors import UserError

_OFF = (False, None)
_ONE = (1, None)
_NONE = (None,)
_ZERO = (0, None)


@dataclass(frozen=True, kw_only=True)
class HfKey:
    """One or more keys of ``config.json`` of the same meaning."""

    names: tuple[str, ...]
    meaning: str
    """Meaning of the keys, as a noun."""
    treatment: Literal["used", "harmless", "refused"]
    """used: decides the model or its data; harmless: changes nothing in training; refused: an error names the key."""
    neutral: tuple[Any, ...] = ()
    """Values under which a refused key changes nothing. An absent key counts as the first."""


def _used(meaning: str, *names: str) -> HfKey:
    return HfKey(names=names, meaning=meaning, treatment="used")


def _harmless(meaning: str, *names: str) -> HfKey:
    return HfKey(names=names, meaning=meaning, treatment="harmless")


def _refused(meaning: str, neutral: tuple[Any, ...], *names: str) -> HfKey:
    return HfKey(names=names, meaning=meaning, treatment="refused", neutral=neutral)


QUANTIZED = ("quantization_config", "compression_config")
"""Refused keys of models whose weights are not plain numbers."""

HF_KEYS = (
    _used("kind of model", "model_type", "architectures"),
    _used("sizes and number of the layers", "hidden_size", "intermediate_size", "num_hidden_layers"),
    _used("attention heads, key and value heads, channels of a head", "num_attention_heads", "num_key_value_heads",
          "head_dim"),
    _used("rows of the embedding", "vocab_size"),
    _used("longest sequence", "max_position_embeddings"),
    _used("epsilon of the norms", "rms_norm_eps"),
    _used("rotary embedding: base, and none or Llama 3's scaling", "rope_theta", "rope_scaling", "rope_parameters"),
    _used("longest sequence before Llama 3's scaling; must equal the one in `rope_scaling`",
          "original_max_position_embeddings"),
    _used("whether the head is the embedding", "tie_word_embeddings"),
    _used("width of random weights", "initializer_range"),
    _used("whose code computes the model: its own is refused", "auto_map"),
    _used("sliding window of attention, and its layers: any is refused", "sliding_window", "use_sliding_window",
          "layer_types"),
    _used("tokens that begin, end and pad a text", "bos_token_id", "eos_token_id", "pad_token_id"),
    _used("data type; an export writes its own", "torch_dtype", "dtype"),
    _harmless("split of matrix products in transformers 4, with the same result", "pretraining_tp"),
    _harmless("unused without a sliding window", "max_window_layers"),
    _harmless("longest sequence in early exports, which transformers never read", "max_sequence_length", "max_seq_len",
              "seq_length", "model_max_length"),
    _harmless("origin of the export, and the program that wrote it", "_name_or_path", "name_or_path", "_commit_hash",
              "transformers_version", "is_llama_config", "unsloth_fixed", "unsloth_version", "finetuning_task",
              "model_name"),
    _harmless("the tokenizer's class and texts put before prompts", "tokenizer_class", "prefix",
              "task_specific_params"),
    _harmless("other special tokens", "sep_token_id", "cls_token_id", "unk_token_id", "mask_token_id",
              "decoder_start_token_id", "pad_token", "bos_token", "eos_token"),
    _harmless("what transformers returns and keeps", "use_cache", "return_dict", "output_attentions",
              "output_hidden_states", "torchscript", "keys_to_ignore_at_inference"),
    _harmless("which kernels transformers takes", "_attn_implementation", "_attn_implementation_autoset",
              "attn_implementation", "_flash_attn_2_enabled", "use_flash_attention", "fused_rms_norm", "use_bfloat16",
              "gradient_checkpointing"),
    _harmless("labels of classifiers", "id2label", "label2id", "num_labels", "problem_type"),
    _harmless("parts of encoders that no LLaMA has", "is_decoder", "is_encoder_decoder", "add_cross_attention",
              "cross_attention_hidden_size", "tie_encoder_decoder", "chunk_size_feed_forward", "pruned_heads",
              "tf_legacy_loss"),
    _harmless("settings of generation", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping",
              "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
              "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
              "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
              "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
              "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    _harmless("settings of the training that made the model", "neftune_noise_alpha", "use_reentrant_checkpointing"),
    _refused("activation of the feed-forward", ("silu", "swish", None), "hidden_act", "hidden_activation",
             "activation_function"),
    _refused("biases", _OFF, "attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "attention_out_bias",
             "lm_head_bias", "use_bias", "bias"),
    _refused("attention to later tokens", (True, None), "is_causal"),
    _refused("attention to later tokens", _OFF, "use_bidirectional_attention"),
    _refused("attention to only part of the context", _NONE, "attention_chunk_size", "sliding_window_pattern"),
    _refused("position embeddings other than rotary", _OFF, "alibi"),
    _refused("position embeddings other than rotary", ("rope", None), "position_embedding_type"),
    _refused("interleaved rotary channels", _OFF, "rope_interleave", "rope_interleaved"),
    _refused("layers without position embeddings", _NONE, "no_rope_layers"),
    _refused("layers without position embeddings", _ZERO, "no_rope_layer_interval"),
    _refused("rotary embedding on part of the channels", _ONE, "partial_rotary_factor", "rotary_pct", "rope_percent"),
    _refused("rotary embedding on part of the channels", _NONE, "rotary_dim"),
    _refused("rotary base under another name", _NONE, "rotary_emb_base", "rope_base"),
    _refused("attention and feed-forward side by side", _OFF, "use_parallel_residual", "parallel_attn"),
    _refused("norms of queries and keys", _OFF, "use_qk_norm", "qk_norm", "qk_layernorm", "qk_layer_norms"),
    _refused("experts", _ZERO, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    _refused("scales (Granite, Cohere, Gemma, MiniCPM)", _NONE, "attention_multiplier", "scale_depth",
             "dim_model_base", "query_pre_attn_scalar"),
    _refused("scales (Granite, Cohere, Gemma, MiniCPM)", _ONE, "embedding_multiplier", "residual_multiplier",
             "logits_scaling", "logit_scale", "lm_head_multiplier", "scale_emb"),
    _refused("scales (Granite, Cohere, Gemma, MiniCPM)", _OFF, "scale_embedding", "mup_enabled",
             "attn_temperature_tuning"),
    _refused("caps of logits, queries, keys and values", _NONE, "final_logit_softcapping", "attn_logit_softcapping",
             "logits_soft_cap", "clip_qkv"),
    _refused("dropout", _ZERO, "attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"),
    _refused("quantized weights", _NONE, *QUANTIZED),
    _refused("another file of weights", _NONE, "transformers_weights"),
)  # fmt: skip
"""All known keys, in the order of the documentation."""

_KNOWN = frozenset(name for row in HF_KEYS for name in row.names)


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a ``config.json`` that stand nowhere in the table, sorted; null might as well be absent."""
    return sorted(key for key, value in config.items() if key not in _KNOWN and value is not None)


ARCHITECTURES = {"llama": ("LlamaForCausalLM", "LLaMAForCausalLM"), "mistral": ("MistralForCausalLM",)}
"""``model_type`` and the classes of that kind; the second spelling is in early exports of LLaMA 1."""

MISTRAL_WINDOW = 4096
"""``sliding_window`` of a Mistral whose config.json does not name it, by transformers' MistralConfig."""


def refuse_other_models(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError naming the key of a ``config.json`` that describes something other than a LLaMA.

    ``source`` is how errors call the file. Mistral is a LLaMA where its sliding window is off.
    """
    _refuse_other_architectures(config, source)
    for row in HF_KEYS:
        for key in row.names if row.treatment == "refused" else ():
            if config.get(key, row.neutral[0]) not in row.neutral:
                if key in QUANTIZED:
                    raise UserError(
                        f"{source}: a quantized model is not supported ({key}); use a copy whose weights are not "
                        "quantized."
                    )
                raise UserError(
                    f"{source}: {key} = {json.dumps(config[key])} is not supported ({row.meaning}); only {key} = "
                    f"{json.dumps(row.neutral[0])} is."
                )
    _refuse_windows(config, source)


def _refuse_other_architectures(config: Mapping[str, Any], source: str) -> None:
    model_type, classes = config.get("model_type"), config.get("architectures")
    known = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        shown = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        known_types = " and ".join(map(json.dumps, ARCHITECTURES))
        raise UserError(
            f"{source}: model_type is {json.dumps(model_type)}{shown}, but only {known_types} models are supported."
        )
    if classes and not (isinstance(classes, list) and any(name in known for name in classes)):
        raise UserError(
            f"{source}: architectures is {json.dumps(classes)}, but of {json.dumps(model_type)} only {known[0]} is "
            "supported."
        )
    own_code = config.get("auto_map")
    if isinstance(own_code, Mapping) and any(name.startswith("AutoModel") for name in own_code):
        raise UserError(
            f"{source}: auto_map says that the folder's own code computes this model, but such code is never run; "
            "use an export whose weights are those of transformers' LLaMA."
        )


def _refuse_windows(config: Mapping[str, Any], source: str) -> None:
    """Attention to everything before is what is built: no window, in no layer."""
    is_mistral = config["model_type"] == "mistral"
    window = config.get("sliding_window", MISTRAL_WINDOW if is_mistral else None)
    # Only Mistral's code lacks the switch: there the window is on whenever it has a size.
    switched_off = config.get("use_sliding_window") is False and not is_mistral
    if window is not None and not switched_off:
        absent = "" if "sliding_window" in config else " (Mistral's default when the key is absent)"
        raise UserError(
            f"{source}: sliding_window = {json.dumps(window)}{absent} is not supported; only sliding_window = null is."
        )
    for layer, kind in enumerate(config.get("layer_types") or ()):
        if kind != "full_attention":
            raise UserError(
                f"{source}: layer_types has {json.dumps(kind)} in layer {layer}, which is not supported; "
                'only "full_attention" is.'
            )


def note_unknown_keys(config: Mapping[str, Any], source: str) -> list[str]:
    """A line for the log where a ``config.json`` has keys that this project doesn't know, else nothing."""
    unknown = unknown_keys(config)
    if not unknown:
        return []
    return [f"{source}: unknown keys are ignored: {', '.join(unknown)} (LLaMA is computed without them)"]
