"""Models with the keys of published config.json give Hugging Face's logits. Run: pytest tests/model"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import build_from_folder, forward_logits
from tests.support.published_configs import CONFIGS
from tests.support.ranks import RankPools

_ROWS = 96
_POSITIONS = 128


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same keys with small sizes; heads keep their ratio, and a head its size relative to the hidden size."""
    heads = config["num_attention_heads"]
    queries = heads // config.get("num_key_value_heads", heads)
    groups = 2 if queries < 8 else 1
    small = {
        "num_attention_heads": queries * groups,
        "num_key_value_heads": groups,
        "head_dim": 24,
        "hidden_size": 16 * queries * groups,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "vocab_size": _ROWS,
        "max_position_embeddings": _POSITIONS,
        "rope_theta": config.get("rope_theta", 0) / 1000,
        "initializer_range": 0.2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
    }
    made = {key: small.get(key, value) for key, value in config.items()}
    if config.get("rope_scaling") is not None:
        made["rope_scaling"] = {**config["rope_scaling"], "original_max_position_embeddings": 32}
    return made


def make_reference(folder: Path, config: dict[str, Any]) -> Path:
    """Random weights, config.json as given, and the logits that transformers computes from both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    with torch.no_grad():  # norms of one would hide a norm that is not applied
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        tokens = torch.randint(0, _ROWS, (2, 48))
        logits = model(tokens).logits
    save_file({name: value.detach().clone() for name, value in model.named_parameters()}, folder / "model.safetensors")
    save_file({"tokens": tokens, "logits": logits}, folder / "reference.st")
    return folder


def run_compare(folder: str) -> tuple[float, float]:
    """Largest difference of two logits, and the largest logit."""
    chunks, _, _ = build_from_folder(folder, {})
    reference = load_file(f"{folder}/reference.st")
    ours = forward_logits(chunks, reference["tokens"], micro_batches=1)[0][..., :_ROWS]
    expected = reference["logits"]
    return (ours - expected).abs().max().item(), expected.abs().max().item()


def test_at_least_fifteen_models_are_compared() -> None:
    assert len(CONFIGS) >= 15


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_table_accepts_computes_transformers_logits(name: str, ranks: RankPools, tmp_path: Path) -> None:
    folder = make_reference(tmp_path, shrunk(CONFIGS[name]))
    [(difference, largest)] = ranks(1).run(run_compare, folder=str(folder))
    assert difference <= 1e-4
    assert largest > 1, "logits near 0 would hide a difference"


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3.2-1B"])
def test_a_shrunk_config_has_the_keys_of_the_published_one(name: str) -> None:
    assert shrunk(CONFIGS[name]).keys() == CONFIGS[name].keys()
