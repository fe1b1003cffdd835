"""Models, tokenizers and data for the checks, made on the spot and the same on every machine.

Weights are drawn by numpy's frozen generator, tensor by tensor by name, so that no release of torch or transformers
changes them: the committed reference losses belong to these bytes.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BYTES = 256
SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCABULARY = BYTES + len(SPECIAL) + 2
"""Vocabulary of the small models: larger than the tokenizer's, and odd, so that TP 2 pads it."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE},
}
"""Differences from 4 layers of 4 heads in 2 groups."""
EXAMPLES = 24


def make_model(folder: Path, **settings: Any) -> Path:
    """A small random LLaMA in fp32 with a tokenizer of bytes, as a Hugging Face folder."""
    from safetensors.numpy import save_file

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": BYTES,
        "eos_token_id": BYTES + 1,
        "torch_dtype": "float32",
    }
    config |= settings
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {name: _values(name, shape) for name, shape in _shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    groups = config["num_key_value_heads"] * (hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (groups, hidden),
            "self_attn.v_proj": (groups, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    draws = np.random.RandomState(zlib.crc32(name.encode()))
    # Norms of one would hide a norm that is not applied.
    values = draws.uniform(0.5, 1.5, shape) if len(shape) == 1 else 0.1 * draws.standard_normal(shape)
    return np.ascontiguousarray(values, dtype=np.float32)


def make_tokenizer(folder: Path) -> Path:
    """A Hugging Face folder whose tokens are bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_examples(path: Path) -> Path:
    """Prompts and completions of very different lengths, with something to learn."""
    rows = [
        {"prompt": f"Say {number}{'!' * (number % 7)}", "completion": f" {3 * number} {'bridge ' * (1 + number % 5)}"}
        for number in range(EXAMPLES)
    ]
    return _write_rows(path, rows)


def write_even_examples(path: Path, *, tokens: int, count: int) -> Path:
    """Examples of exactly this many tokens each, begin and end included, for measuring packed sequences."""
    rows = []
    for number in range(count):
        prompt = f"{number}:"
        assert tokens > len(prompt) + 2, f"{tokens} tokens have no room for an answer"
        words = " ".join(str(number + step) for step in range(tokens))
        rows.append({"prompt": prompt, "completion": words[: tokens - len(prompt) - 2]})
    return _write_rows(path, rows)


def write_pairs(path: Path) -> Path:
    """Preference pairs."""
    rows = [
        {
            "prompt": f"Say {number}",
            "chosen": f" {3 * number} bridge",
            "rejected": f" {number} {'no ' * (number % 4 + 1)}",
        }
        for number in range(EXAMPLES)
    ]
    return _write_rows(path, rows)


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
