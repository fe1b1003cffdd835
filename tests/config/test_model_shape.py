"""A LLaMA's shape from config.json and back. Run: pytest tests/config/test_model_shape.py"""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.model import ModelConfig
from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape, load_hf_config
from hft_megatron.errors import UserError

TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "multi-head": ModelShape.from_hf_config({**TINY, "num_key_value_heads": 4}, "test"),
    "grouped": ModelShape.from_hf_config(TINY, "test"),
    "tied": ModelShape.from_hf_config({**TINY, "tie_word_embeddings": True}, "test"),
    "wide heads": ModelShape.from_hf_config({**TINY, "head_dim": 32}, "test"),
    "llama3 rope": ModelShape.from_hf_config({**TINY, "rope_theta": 5e5, "rope_scaling": LLAMA3}, "test"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_survives_our_own_config_json(shape: ModelShape) -> None:
    assert ModelShape.from_hf_config(json.loads(json.dumps(shape.to_hf_config())), "test") == shape


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_reads_the_exported_config_and_counts_the_same_parameters(
    shape: ModelShape, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf_config()))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameter_count()
    # What transformers 5 writes has rope_parameters instead of rope_theta and rope_scaling.
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ModelShape.from_hf_config(written, "test") == shape


def test_the_old_name_of_the_rope_type_and_absent_keys_are_read_as_transformers_does() -> None:
    old = {key: value for key, value in LLAMA3.items() if key != "rope_type"} | {"type": "llama3"}
    minimal = {key: TINY[key] for key in TINY if key not in ("num_key_value_heads", "rms_norm_eps")}
    shape = ModelShape.from_hf_config({**minimal, "rope_scaling": old}, "test")
    assert shape.rope_scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    assert (shape.num_query_groups, shape.norm_epsilon, shape.rotary_base) == (4, 1e-6, 10000.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "'factor' is missing"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, "is 32, but 64 in rope_scaling"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for 'full_attention'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ],
)
def test_a_model_that_cannot_be_represented_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        ModelShape.from_hf_config({**TINY, **change}, "DIR/config.json")
    assert said in str(error.value)
    assert str(error.value).startswith("DIR/config.json: ")


def test_flags_leave_out_what_megatron_derives() -> None:
    config = ModelConfig(num_layers=2, hidden_size=512, num_attention_heads=8, max_position_embeddings=64)
    shape = ModelShape.from_model_config(config, vocab_size=100)
    assert (shape.num_query_groups, shape.kv_channels, shape.ffn_hidden_size) == (8, 64, 1344)
    assert shape.tie_embeddings
    assert shape.vocab_size == 100


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_missing_size_is_named_as_its_flag(name: str) -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    del sizes[name]
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is missing"):
        ModelShape.from_model_config(ModelConfig(**sizes), vocab_size=100)


def test_a_folder_that_is_no_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load_hf_config(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"there is no config\.json"):
        load_hf_config(str(tmp_path))
    for contents, said in ((b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "holds a list")):
        (tmp_path / "config.json").write_bytes(contents)
        with pytest.raises(UserError, match=said):
            load_hf_config(str(tmp_path))
