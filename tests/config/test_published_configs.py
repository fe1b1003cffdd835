"""Published models: their config.json gives the right shape and number of parameters. Run: pytest tests/config"""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.hf_keys import note_unknown_keys
from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape
from hft_megatron.errors import UserError
from tests.support.published_configs import CONFIGS, REFUSED

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
    "Llama-2-13B": (40, 5120, 13824, 40, 40, 128, 32000, 4096, 1e-5, 1e4, None, False, 13_015_864_320),
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, None, True, 134_515_008),
    "Yi-6B": (32, 4096, 11008, 32, 4, 128, 64000, 4096, 1e-5, 5e6, None, False, 6_061_035_520),
    "Vicuna-7B-v1.5": (32, 4096, 11008, 32, 32, 128, 32000, 4096, 1e-5, 1e4, None, False, 6_738_415_616),
    "CodeLlama-7B": (32, 4096, 11008, 32, 32, 128, 32016, 16384, 1e-5, 1e6, None, False, 6_738_546_688),
    "OpenLLaMA-3B": (26, 3200, 8640, 32, 32, 100, 32000, 2048, 1e-6, 1e4, None, False, 3_426_473_600),
    "DeepSeek-LLM-7B": (30, 4096, 11008, 32, 32, 128, 102400, 4096, 1e-6, 1e4, None, False, 6_910_365_696),
    "Phi-4 as LLaMA": (40, 5120, 17920, 40, 10, 128, 100352, 16384, 1e-5, 25e4, None, False, 14_659_507_200),
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
        init_method_std=CONFIGS[name]["initializer_range"],
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


@pytest.mark.parametrize("name", CONFIGS)
def test_no_key_of_an_accepted_config_is_unknown(name: str) -> None:
    assert note_unknown_keys(CONFIGS[name], "config.json") == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_of_another_model_is_refused_by_what_differs(name: str) -> None:
    config, said = REFUSED[name]
    with pytest.raises(UserError) as error:
        ModelShape.from_hf_config(config, "config.json")
    assert said in str(error.value)
