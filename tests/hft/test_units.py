import subprocess
import sys

import pytest

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.hft.units import units_of

LLAMA_2_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
    max_position_embeddings=4096,
)
QWEN_LIKE = ModelShape(
    num_layers=1,
    hidden_size=10,
    ffn_hidden_size=30,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=7,
    max_position_embeddings=16,
    tie_embeddings=True,
)


def test_units_of_llama_2_7b_hold_every_parameter_once() -> None:
    units = units_of(LLAMA_2_7B)
    assert len(units) == 32 * 9 + 3
    assert len({unit.name for unit in units}) == len(units)
    assert sum(unit.parameters for unit in units) == 6_738_415_616  # what Hugging Face reports for the model


def test_a_layer_has_the_hugging_face_names_and_sizes_with_grouped_queries_and_a_head_dim_of_its_own() -> None:
    assert [(unit.name, unit.layer, unit.category, unit.parameters) for unit in units_of(QWEN_LIKE)] == [
        ("model.embed_tokens", None, "embedding", 70),
        ("model.layers.0.self_attn.q_proj", 0, "attention", 120),
        ("model.layers.0.self_attn.k_proj", 0, "attention", 60),
        ("model.layers.0.self_attn.v_proj", 0, "attention", 60),
        ("model.layers.0.self_attn.o_proj", 0, "attention", 120),
        ("model.layers.0.mlp.gate_proj", 0, "feed_forward", 300),
        ("model.layers.0.mlp.up_proj", 0, "feed_forward", 300),
        ("model.layers.0.mlp.down_proj", 0, "feed_forward", 300),
        ("model.layers.0.input_layernorm", 0, "norm", 10),
        ("model.layers.0.post_attention_layernorm", 0, "norm", 10),
        ("model.norm", None, "final_norm", 10),
    ]


@pytest.mark.parametrize("module", ["units", "selection", "plan"])
def test_the_pure_method_imports_no_torch(module: str) -> None:
    code = f"import sys, hft_megatron.hft.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
