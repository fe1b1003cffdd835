"""The shape of a LLaMA model, from a Hugging Face ``config.json`` or from flags. Imports no torch.

Everything that the model code cannot represent is refused by name, here and in ``hf_keys``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hft_megatron.config.adapters import Adapters
from hft_megatron.config.declared import check_bounds, flag
from hft_megatron.config.hf_keys import refuse_other_models
from hft_megatron.config.model import ModelConfig
from hft_megatron.errors import UserError

HF_CONFIG_FILE = "config.json"

_HF_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
"""Keys that every config.json of a LLaMA has, and our names for them."""


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama-3's frequency scaling of rotary embeddings (``rope_type: llama3`` in config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that fixes a LLaMA's parameters and its forward pass."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; fewer than ``num_attention_heads`` is grouped-query attention."""
    kv_channels: int
    """Channels of one head (Hugging Face's ``head_dim``)."""
    vocab_size: int
    """Rows of the embedding as Hugging Face has them, before padding for tensor parallelism."""
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_embeddings: bool = False
    init_method_std: float = 0.02
    adapters: Adapters | None = None
    """Adapters beside the matrices of the layers; None for a model without."""

    @property
    def base(self) -> ModelShape:
        """The same model without adapters."""
        return self if self.adapters is None else replace(self, adapters=None)

    @staticmethod
    def from_hf_config(config: Mapping[str, Any], source: str) -> ModelShape:
        """Read the contents of a ``config.json``; ``source`` names the file in errors.

        Values that are absent get the defaults of transformers' ``LlamaConfig`` or ``MistralConfig``. Raises UserError
        naming the key when the model is not a LLaMA or is one that this project cannot represent.
        """
        refuse_other_models(config, source)
        sizes = {ours: _positive_integer(config, key, source) for key, ours in _HF_SIZES.items()}
        heads = sizes["num_attention_heads"]
        if config.get("head_dim") is None and sizes["hidden_size"] % heads:
            raise UserError(
                f"{source}: hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads {heads}."
            )
        is_mistral = config["model_type"] == "mistral"
        groups = 8 if is_mistral and "num_key_value_heads" not in config else heads
        positions = 4096 * 32 if is_mistral else 2048
        rotary_base, scaling = _rope_from_hf(config, source)
        return ModelShape(
            **sizes,  # type: ignore[arg-type]  # of the fields that are sizes
            num_query_groups=_positive_integer(config, "num_key_value_heads", source, default=groups),
            kv_channels=_positive_integer(config, "head_dim", source, default=sizes["hidden_size"] // heads),
            max_position_embeddings=_positive_integer(config, "max_position_embeddings", source, default=positions),
            norm_epsilon=_positive_number(config, "rms_norm_eps", source, default=1e-6),
            rotary_base=rotary_base,
            rope_scaling=scaling,
            tie_embeddings=_switch(config, "tie_word_embeddings", source),
            init_method_std=_positive_number(config, "initializer_range", source, default=0.02),
        )

    @staticmethod
    def from_model_config(config: ModelConfig, vocab_size: int) -> ModelShape:
        """The shape that the flags describe, for a model with random weights.

        Unset sizes follow Megatron: query groups = heads, channels of a head = hidden / heads, and a SwiGLU
        feed-forward of 8/3 hidden rounded down to a multiple of 64. ``vocab_size`` is the embedding's rows.
        Raises UserError naming a size that is missing or not positive.
        """
        check_bounds(config)
        hidden_size = _size_from_flag(config, "hidden_size")
        heads = _size_from_flag(config, "num_attention_heads")
        return ModelShape(
            num_layers=_size_from_flag(config, "num_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=_size_from_flag(config, "ffn_hidden_size", default=hidden_size * 8 // 3 // 64 * 64),
            num_attention_heads=heads,
            num_query_groups=_size_from_flag(config, "num_query_groups", default=heads),
            kv_channels=_size_from_flag(config, "kv_channels", default=hidden_size // heads),
            vocab_size=vocab_size,
            max_position_embeddings=_size_from_flag(config, "max_position_embeddings"),
            norm_epsilon=config.norm_epsilon,
            rotary_base=config.rotary_base,
            tie_embeddings=not config.untie_embeddings_and_output_weights,
            init_method_std=config.init_method_std,
        )

    def to_hf_config(self) -> dict[str, Any]:
        """The architecture as a ``LlamaForCausalLM`` config.json, without dtype and token ids.

        Rotary embeddings are written as ``rope_theta`` and ``rope_scaling``: transformers 4.x knows nothing
        else, and 5.x turns them into its ``rope_parameters`` when it reads the file.
        """
        scaling = None if self.rope_scaling is None else {"rope_type": "llama3", **asdict(self.rope_scaling)}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(self, ours) for key, ours in _HF_SIZES.items()},
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rotary_base,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_method_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
        }

    def parameter_count(self) -> int:
        """Parameters of the model, tied embeddings counted once and padding of the vocabulary not at all."""
        query = self.num_attention_heads * self.kv_channels
        key_value = self.num_query_groups * self.kv_channels
        attention = self.hidden_size * (2 * query + 2 * key_value)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def load_hf_config(folder: str) -> dict[str, Any]:
    """Read ``folder/config.json``; UserError when the folder or the file is missing, unreadable or not JSON."""
    path = Path(folder) / HF_CONFIG_FILE
    if not Path(folder).is_dir():
        raise UserError(f"--load-hf {folder}: there is no such folder; give a Hugging Face model folder.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--load-hf {folder}: there is no {HF_CONFIG_FILE}, so it is not a model folder.") from None
    except OSError as error:
        raise UserError(f"--load-hf {folder}: {HF_CONFIG_FILE} cannot be read ({error.strerror}).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--load-hf {folder}: {HF_CONFIG_FILE} is not valid JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--load-hf {folder}: {HF_CONFIG_FILE} holds a {type(loaded).__name__}, not a JSON object.")
    return loaded


def _size_from_flag(config: ModelConfig, name: str, default: int | None = None) -> int:
    value = getattr(config, name)
    size: int | None = default if value is None else value
    if size is None:
        raise UserError(f"{flag(name)} is missing; give it, or start from a model folder with --load-hf.")
    return size


def _rope_from_hf(config: Mapping[str, Any], source: str) -> tuple[float, Llama3RopeScaling | None]:
    """(rotary base, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    # In transformers 5 a rope_scaling overrides rope_parameters; here too.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: rope_scaling is {rope!r}, which is not a JSON object.")
    nested = next((key for key, value in rope.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise UserError(f"{source}: rope parameters of their own for {nested!r} are not supported; only one set is.")
    base = _positive_number(rope if "rope_theta" in rope else config, "rope_theta", source, default=10000.0)
    partial = rope.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"{source}: partial_rotary_factor = {partial!r} is not supported; only 1.0 is.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"{source}: rope type {kind!r} is not supported; only 'default' and 'llama3' are.")
    scaling = Llama3RopeScaling(
        factor=_positive_number(rope, "factor", source),
        low_freq_factor=_positive_number(rope, "low_freq_factor", source),
        high_freq_factor=_positive_number(rope, "high_freq_factor", source),
        original_max_position_embeddings=_positive_integer(rope, "original_max_position_embeddings", source),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(
            f"{source}: high_freq_factor {scaling.high_freq_factor} must be larger than "
            f"low_freq_factor {scaling.low_freq_factor}."
        )
    # transformers takes the one or the other, depending on where the config was made.
    outside = config.get("original_max_position_embeddings")
    if outside not in (None, scaling.original_max_position_embeddings):
        raise UserError(
            f"{source}: original_max_position_embeddings is {outside!r}, but "
            f"{scaling.original_max_position_embeddings} in rope_scaling; remove the wrong one."
        )
    return base, scaling


def _switch(config: Mapping[str, Any], key: str, source: str) -> bool:
    value = config.get(key)
    if value not in (True, False, None):
        raise UserError(f"{source}: {key} is {value!r}, which is neither true nor false.")
    return bool(value)


def _positive_number(config: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        if default is None:
            raise UserError(f"{source}: the key {key!r} is missing.")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{source}: {key} is {value!r}, which is not a positive number.")
    return float(value)


def _positive_integer(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = _positive_number(config, key, source, default=default)
    if value != int(value):
        raise UserError(f"{source}: {key} is {value!r}, which is not a whole number.")
    return int(value)
